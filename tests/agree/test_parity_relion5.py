"""One iteration of RELION 5.0.1 repeated from its own files and compared number by number (../shared/data/parity_relion5).

In float64, with the forms RELION uses where ours differ on purpose (Engine.relion_form): 4 to 5 is a global search at order 2, 8 to 9
a local one at order 4. What is not equal is explained here and in CONVENTIONS.md:

* RELION ran as three processes a half set. Each measured the scales of the micrographs from the particles it had worked on,
  normalised them, and went on with its own; model.star holds those of the first. With the file's scales for all, a third of the
  particles agree to the digits written and the others differ as their scales do. relion_processes.json holds the scales and
  processes as inferred: the log-likelihood and the norm correction of a particle each imply a scale; these fall into three heaps
  a micrograph and half, and a particle belongs to the heap in which norm, log-likelihood and Pmax agree together.
* In the reconstruction RELION adds no prior at the voxels with |p| exactly P·r_max (137 of 70,000 at n_c = 42).
* The expected accuracies come from 100 random particles and random axes: they agree within that scatter only (10 %).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.agree.parity import (
    BOX,
    COLUMNS,
    DIAMETER,
    PAD,
    PIXEL,
    Pair,
    by_process,
    folder,
    inferred,
    kept_statistics,
    map_fsc,
    process_of,
    relative,
    relion_map,
    rows_of,
    stack,
    worst,
)
from torch import Tensor

import frazil.steps.refine3d as step
from frazil.io.particles import read_particles
from frazil.io.star import read_star
from frazil.jobs.refine_files import read_model, read_refinement
from frazil.maths.rotation import matrix_to_euler, rotation_angle
from frazil.maths.symmetry import operators
from frazil.refine import maximization as m_step
from frazil.refine.initial import initial_noise
from frazil.refine.model import Model, Statistics
from frazil.refine.sampling import Sampling, make_grid
from frazil.steps.refine3d import Job, Refine3dParams, State, iterate, make_engine

pytestmark = [pytest.mark.agree, pytest.mark.real]

PROCESSES = inferred("relion_processes.json")
SCALES = {n: {h: torch.tensor(PROCESSES[str(n)]["scales"][str(h)], dtype=torch.float64) for h in (1, 2)} for n in (4, 8)}
PARAMS = Refine3dParams(initial_lowpass=25, symmetry="D2", diameter=DIAMETER, offset_range=6, offset_step=2.4, perturb=0)


@pytest.fixture(scope="module")
def data(shared_data: Path) -> Path:
    """The folder of RELION's files."""
    return folder(shared_data, "refine3d", "run_it004_optimiser.star")


@dataclass(frozen=True)
class HalfPair(Pair):
    """An iteration of ours and the same of RELION."""

    ours: State
    theirs: State
    statistics: list[Statistics]
    process: Tensor  # (n,) of our rows

    def halves(self) -> list[tuple[Model, Model]]:
        return list(zip(self.ours.models, self.theirs.models, strict=True))


def load(data: Path, n: int):
    """(state, particle table, names of images) after RELION's iteration n."""
    state, table = read_refinement(data / f"refine3d/run_it{n:03d}_optimiser.star", data)
    return state, table, table.table["rlnImageName"].tolist()


def with_processes(state: State, names: list[str], n: int) -> tuple[State, Tensor]:
    """The state with RELION's nine scales a half, and the process of each particle."""
    process = process_of(names, PROCESSES[str(n)]["process"])
    models = tuple(replace(m, scales=SCALES[n][h].reshape(-1)) for h, m in enumerate(state.models, 1))
    return replace(state, particles=by_process(state.particles, process), models=models), process


@pytest.fixture(scope="module")
def repeat(data: Path) -> Callable[..., HalfPair]:
    """repeat(n, processes, dtype): iteration n+1 from the files of iteration n, calculated once."""

    @cache
    def run(n: int, processes: bool, dtype: torch.dtype = torch.float64) -> HalfPair:
        state, _, names = load(data, n)
        theirs, wanted, their_names = load(data, n + 1)
        scaled, process = with_processes(state, names, n)
        if processes:
            state = scaled
        state = replace(state, models=tuple(replace(m, maps=m.maps.to(dtype)) for m in state.models))
        with kept_statistics(step) as kept:
            ours = iterate(Job(stack(data, names), PARAMS, make_engine(PARAMS, dtype=dtype, relion_form=True)), state)
        columns = {label: torch.tensor(wanted.table[label].to_numpy(dtype=float)) for label in COLUMNS}
        return HalfPair((ours.particles, theirs.particles), ours.poses.pmax, rows_of(their_names, names), columns, ours.progress.size, "D2",
                        ours, theirs, kept[0], process)  # fmt: skip

    return run


ITERATIONS = pytest.mark.parametrize("n", [4, pytest.param(8, marks=pytest.mark.slow)])


class TestWithTheScalesOfEachProcess:
    """Everything of the issue's bar, and far tighter."""

    @ITERATIONS
    def test_sizes_sampling_and_changes(self, repeat, n):
        pair = repeat(n, True)
        a, b = pair.ours.progress, pair.theirs.progress
        size = {4: 42, 8: 56}[n]  # rlnCurrentImageSize of RELION's model.star
        assert (a.size, a.shell, a.increment, a.high_fsc) == (size, b.shell, b.increment, b.high_fsc)
        assert (a.no_gain, a.no_change, a.fine_enough) == (b.no_gain, b.no_change, b.fine_enough)
        assert a.change_rotation == pytest.approx(b.change_rotation, abs=2e-6)  # mean over all particles, six decimals written
        assert a.change_shift == pytest.approx(b.change_shift, abs=2e-6)
        assert pair.ours.sampling.order == pair.theirs.sampling.order

    @ITERATIONS
    def test_noise_and_signal_spectra(self, repeat, n):
        pair = repeat(n, True)
        for a, b in pair.halves():
            everything = slice(0, BOX // 2 + 1)
            assert worst(a.sigma2[0], b.sigma2[0], everything) < 1e-4  # bar 1 %
            assert worst(a.sigma2_map, b.sigma2_map, pair.shells) < 1e-4
            # One particle of 755 goes another way in 4 to 5 (test_posteriors).
            assert worst(a.tau2, b.tau2, pair.shells) < {4: 6e-3, 8: 2e-4}[n]  # bar 1 %
            assert (a.fsc - b.fsc).abs().max() < {4: 1e-3, 8: 1e-5}[n]
            assert (a.coverage[0] - b.coverage[0]).abs().max() < {4: 3e-3, 8: 1e-5}[n]

    @ITERATIONS
    def test_poses(self, repeat, n):
        """Bar: 97 % the same. All are."""
        assert repeat(n, True).same_pose().double().mean() >= 0.998

    @ITERATIONS
    def test_posteriors(self, repeat, n):
        """In 4 to 5 one particle of 755 (Pmax 0.07 away) keeps another significant sample."""
        pair = repeat(n, True)
        error = pair.pmax_error()
        assert error.median() < 2e-6
        assert (error < 1e-4).double().mean() > 0.995
        same = pair.ours.poses.significant[pair.match] == pair.table["rlnNrOfSignificantSamples"]
        assert same.double().mean() > 0.98
        # RELION writes half 1's mean of Pmax in both models.
        assert pair.ours.models[0].ave_pmax == pytest.approx(pair.theirs.models[0].ave_pmax, abs=3e-4)  # bar 0.005

    @ITERATIONS
    def test_norm_and_offsets(self, repeat, n):
        pair = repeat(n, True)
        norm = pair.ours.particles.norm[pair.match] / pair.table["rlnNormCorrection"] - 1
        assert norm.abs().median() < 1e-6
        assert (norm.abs() < 2e-4).double().mean() > 0.995  # bar 0.5 %
        for a, b in pair.halves():
            assert a.sigma_offset == pytest.approx(b.sigma_offset, rel=5e-5)
            assert (a.pdf_direction - b.pdf_direction).abs().sum() < 2e-3
            assert a.norm_average == pytest.approx(b.norm_average, rel=1.5e-3)  # bar 0.5 %; 0.03 and 0.08 %, for:
        for s, b in zip(pair.statistics, pair.theirs.models, strict=True):  # RELION divides by the posterior mass kept, not by the number
            assert s.norm / float(s.direction.sum()) == pytest.approx(b.norm_average, rel=3e-6)

    @ITERATIONS
    def test_maps(self, repeat, n):
        """Bar: FSC > 0.999 and 2 %. It holds in the last shells but for the voxels at |p| = P·r_max, see the next test."""
        pair = repeat(n, True)
        for a, b in pair.halves():
            assert relative(a.maps[0], b.maps[0]) < 0.01  # 0.4 to 0.8 %
            curve = map_fsc(a.maps[0], b.maps[0])
            edge = pair.ours.progress.size // 2 - 1
            assert curve[:edge].min() > 0.999
            assert curve[edge] > 0.99  # 0.9934 and 0.9948 for 4 to 5, 0.9977 and 0.9992 for 8 to 9

    @ITERATIONS
    def test_maps_with_relions_edge(self, repeat, n):
        """The same sums divided as RELION divides them: no prior at |p| = P·r_max exactly. The maps then agree to 0.07 %."""
        pair = repeat(n, True)
        for ours, (_, theirs) in zip(relion_maps(pair), pair.halves(), strict=True):
            assert relative(ours, theirs.maps[0]) < 2e-3
            assert map_fsc(ours, theirs.maps[0]).min() > 0.999  # every shell of the box

    @ITERATIONS
    def test_scales(self, repeat, n):
        """The scales the first process measured are those of the new model.star within 1.6 % (bar 1 %; rms 0.7 and 1.0 %).

        What is left is not explained: no choice of shells, weights, masked or unmasked image, old or new pose gives less than 0.9 % in
        4 to 5. The scatter between 40 particles leaves such a scale 3 % uncertain, so most of the sum is the same.
        """
        pair = repeat(n, True)
        errors = []
        for h, statistics in enumerate(pair.statistics, 1):
            mine = (statistics.scale_cross / statistics.scale_power).reshape(3, 3)
            count = torch.bincount(pair.ours.particles.micrograph[pair.ours.particles.half == h], minlength=9).reshape(3, 3).sum(0)
            mine = mine / (mine @ count.double() / count.sum())[:, None]
            errors.append(mine / pair.theirs.models[h - 1].scales - 1)
        error = torch.cat(errors, 1)  # (process, micrographs of both halves)
        assert error[0].abs().max() < 0.02
        rms = error.square().mean(1).sqrt()
        assert rms[0] < 0.75 * rms[1:].min()  # those of the other processes are further away


def relion_maps(pair: HalfPair) -> list[Tensor]:
    """Maps of the halves from our sums, divided with RELION's edge."""
    sums = [m_step.prepare_sums_(s.data[0].clone(), s.weight[0].clone(), "D2") for s in pair.statistics]
    shared = math.ceil(BOX * PIXEL / 40)
    low = [m_step.low_resolution_part(d, w, PAD, shared) for d, w in sums]
    for h, (data, weight) in enumerate(sums):
        m_step.join_low_resolution_(data, weight, low[h], low[1 - h], PAD, shared)
    return [relion_map(data, weight, pair.theirs.models[h].tau2[0]) for h, (data, weight) in enumerate(sums)]


class TestWithTheScalesOfTheFile:
    """What a user sees who takes model.star at its word: two thirds of the particles were compared at other scales (up to 5 %)."""

    @ITERATIONS
    def test_agreement(self, repeat, n):
        pair = repeat(n, False)
        for a, b in pair.halves():
            assert worst(a.sigma2[0], b.sigma2[0], slice(0, BOX // 2 + 1)) < 0.005  # bar 1 %
            assert relative(a.maps[0], b.maps[0]) < 0.02  # 1.3 % and 0.8 %
            # Bar 1 %: 0.5 % up to shell 8; beyond, 5 % (4 to 5) and 1.4 % (8 to 9), since tau2 multiplies the FSC's change by 1/(1 − FSC).
            assert worst(a.tau2, b.tau2, slice(0, 9)) < 0.01
            assert worst(a.tau2, b.tau2, pair.shells) < {4: 0.06, 8: 0.02}[n]
        assert abs(pair.ours.models[0].ave_pmax - pair.theirs.models[0].ave_pmax) < 0.005
        same = pair.same_pose()
        assert same.double().mean() > 0.97
        assert (pair.angles()[~same] < 16).double().sum() >= (~same).sum() - 1  # neighbours, but one particle with two poses as likely

    @ITERATIONS
    def test_a_third_is_exact(self, repeat, n):
        """The particles of the process that wrote model.star, and they alone."""
        pair = repeat(n, False)
        open_minded = pair.table["rlnMaxValueProbDistribution"] < 0.98  # those whose Pmax can move
        first = pair.process[pair.match] == 0
        exact = pair.pmax_error() < 1e-5
        assert exact[first & open_minded].double().mean() > 0.9
        assert exact[~first & open_minded].double().mean() < 0.1


class TestProcesses:
    """The inferred scales obey what RELION does with scales, which was not used to infer them."""

    @pytest.mark.parametrize("n", [4, 8])
    def test_means_and_jobs(self, data, n):
        state, _, names = load(data, n)
        _, process = with_processes(state, names, n)
        for h in (1, 2):
            mine = state.particles.half == h
            count = torch.bincount(state.particles.micrograph[mine], minlength=3).double()
            assert (SCALES[n][h] @ count / count.sum() - 1).abs().max() < 2e-5  # normalised by the mean over the half's particles
            assert (SCALES[n][h][0] - state.models[h - 1].scales).abs().max() < 2e-6
            members = torch.bincount(process[mine], minlength=3)
            # Particles are handed out in jobs of --pool 3 times --j 2; only the last job may be smaller.
            assert ((members % 6) > 0).sum() <= 1


class TestFloat32:
    """The production type gives what float64 gives."""

    def test_agrees_with_float64(self, repeat):
        """Rounding reaches the map only where it decides whether a coarse sample at the edge of the 99.9 % goes to the fine pass.

        With the file's scales no such sample matters here: the maps agree to 1e-5. With the scales of each process one particle of
        755 moves 14 % of its posterior and half 2's FSC falls to 0.9983 at shell 20.
        """
        double, single = repeat(4, False), repeat(4, False, torch.float32)
        assert single.ours.models[0].maps.dtype == torch.float32
        angle = rotation_angle(single.ours.particles.rotation, double.ours.particles.rotation, operators("D2"))
        moved = (single.ours.particles.shift - double.ours.particles.shift).norm(dim=-1)
        assert ((angle < 0.01) & (moved < 0.01)).double().mean() >= 0.99
        for a, b in zip(single.ours.models, double.ours.models, strict=True):
            assert worst(a.sigma2[0], b.sigma2[0], slice(0, BOX // 2 + 1)) < 0.005
            assert map_fsc(a.maps[0], b.maps[0])[double.shells].min() > 0.999
        assert (single.ours.poses.pmax - double.ours.poses.pmax).abs().median() < 1e-6


class TestBeforeTheFirstIteration:
    def test_noise_spectrum(self, data):
        """Spec 2.2: all 33 shells, to the six digits written."""
        particles = read_particles(data / "class3d" / "run_it000_data.star")
        images = stack(data, particles.table["rlnImageName"].tolist())
        engine = make_engine(PARAMS, dtype=torch.float64)
        (ours,) = initial_noise(images, particles.particles, (BOX, PIXEL), engine)
        theirs = read_model(data / "class3d" / "run_it000_model.star", data).sigma2[0]
        assert worst(ours, theirs, slice(0, BOX // 2 + 1)) < 2e-5

    @pytest.mark.parametrize("n", [4, 8])
    def test_coarse_directions(self, data, n):
        """The coarse directions and their order."""
        star = read_star(data / f"refine3d/run_it{n:03d}_sampling.star")
        theirs = np.stack([np.asarray(star["sampling_directions"][f"rlnAngle{x}"], dtype=float) for x in ("Rot", "Tilt")], -1)
        order = int(dict(star["sampling_general"])["rlnHealpixOrder"])
        grid = make_grid(Sampling(order=order, offset_range=1, offset_step=1, group="D2"))
        ours = grid.table[grid.pixels].numpy()
        assert ours.shape == theirs.shape
        turn = np.abs(ours[:, 0] - theirs[:, 0])
        assert np.minimum(turn, 360 - turn).max() < 2e-6 and np.abs(ours[:, 1] - theirs[:, 1]).max() < 2e-6

    @pytest.mark.parametrize(("n", "order"), [(5, 2), (9, 4)])
    def test_fine_orientations(self, data, n, order):
        """Every pose of RELION is one of our fine orientations."""
        state, _, _ = load(data, n)
        grid = make_grid(Sampling(order=order, offset_range=1, offset_step=1, group="D2"))
        fine = (grid.pixels[:, None] * 4 + torch.arange(4)).reshape(-1)
        euler = matrix_to_euler(state.particles.rotation)
        rot = (euler[:, None, 0] - grid.fine_table[fine, 0] + 180) % 360 - 180
        tilt = euler[:, None, 1] - grid.fine_table[fine, 1]
        assert (rot.abs() + tilt.abs()).amin(1).max() < 1e-5
        step_psi = 360 / grid.n_psi
        children = (torch.arange(2) + 0.5) / 2 * step_psi - step_psi / 2
        psi = (euler[:, 2, None] - children + 180) % step_psi
        assert torch.minimum(psi, step_psi - psi).amin(1).max() < 1e-5
