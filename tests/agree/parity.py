"""What the comparisons with RELION 5.0.1's iterations share (../shared/data/parity_relion5): the set, the repetition of an iteration from
RELION's own files, with the scales of each of its processes if asked for, and how far two results are apart."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import frazil.steps.classify
from frazil.data import Particles
from frazil.io.images import StackImages
from frazil.jobs.classify_files import read_classification
from frazil.maths.fourier import map_from_half_volume, shell_round
from frazil.maths.fourier2d import hermitian_planes, images_from_planes
from frazil.maths.gridding import sinc2
from frazil.maths.masks import mask_images, mask_volume
from frazil.maths.rotation import rotation_angle
from frazil.maths.symmetry import operators
from frazil.refine import maximization as m_step
from frazil.refine.model import Statistics
from frazil.refine.planes import flatten_planes
from frazil.steps.classify import ClassifyJob, ClassifyParams, ClassifyState, Form, iterate, make_engine

BOX, PIXEL, DIAMETER, PAD = 64, 3.54, 200.0, 2.0
COLUMNS = ("rlnMaxValueProbDistribution", "rlnNrOfSignificantSamples", "rlnNormCorrection", "rlnLogLikeliContribution")


def folder(shared_data: Path, kind: str, first: str) -> Path:
    """The folder of RELION's files; skips where those of a job (kind) are not there."""
    path = shared_data / "parity_relion5"
    if not (path / kind / first).exists():
        pytest.skip(f"no files of RELION 5.0.1 in {path}")
    return path


def inferred(name: str) -> Any:
    """What was inferred of RELION's processes: a JSON file beside the tests."""
    return json.loads((Path(__file__).parent / name).read_text())


def stack(data: Path, names: list[str]) -> StackImages:
    """The particle images RELION worked on."""
    return StackImages(names, data.parent / "betagal_10204" / "particles.star", memory_budget=1 << 30)


def rows_of(wanted: list[str], names: list[str]) -> Tensor:
    """(n,) our row of each of RELION's particles."""
    row = {name: i for i, name in enumerate(names)}
    return torch.tensor([row[name] for name in wanted])


def process_of(names: list[str], digits: str) -> Tensor:
    """(n,) the process that worked on a particle; digits: of the particles in the order of their names."""
    process = torch.empty(len(names), dtype=torch.int64)
    process[torch.tensor(sorted(range(len(names)), key=names.__getitem__))] = torch.tensor([int(c) for c in digits])
    return process


def by_process(particles: Particles, process: Tensor) -> Particles:
    """The particles with a micrograph of its own for each process: number 3 · process + micrograph."""
    names = tuple(f"{p} {m}" for p in range(int(process.max()) + 1) for m in particles.micrographs)
    return replace(particles, micrograph=3 * process + particles.micrograph, micrographs=names)


@contextmanager
def kept_statistics(step: ModuleType) -> Iterator[list[Any]]:
    """What the step's `expect` gives first, call by call, copied because the M-step works in place."""
    kept: list[Any] = []
    true_expect = step.expect

    def copy(s: Statistics) -> Statistics:
        return replace(s, data=s.data.clone(), weight=s.weight.clone())

    def expect(*args: Any, **kwargs: Any) -> Any:
        result = true_expect(*args, **kwargs)
        kept.append(copy(result[0]) if isinstance(result[0], Statistics) else [copy(s) for s in result[0]])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "expect", expect)
        yield kept


@dataclass(frozen=True)
class Pair:
    """Particles after an iteration of ours and after the same of RELION."""

    particles: tuple[Particles, Particles]  # ours, theirs
    pmax: Tensor  # (n,) ours
    match: Tensor  # (n,) our row of each of RELION's particles
    table: dict[str, Tensor]  # columns of RELION's data.star
    size: int  # of the window
    group: str  # their symmetry

    @property
    def shells(self) -> slice:
        """Those within the window."""
        return slice(0, self.size // 2 + 1)

    def same_class(self) -> Tensor:
        a, b = self.particles
        return a.klass[self.match] == b.klass

    def angles(self) -> Tensor:
        """(n,) degrees between our orientations and RELION's."""
        a, b = self.particles
        return rotation_angle(a.rotation[self.match], b.rotation, operators(self.group))

    def shifts(self) -> Tensor:
        """(n,) Å between our shifts and RELION's."""
        a, b = self.particles
        return (a.shift[self.match] - b.shift).norm(dim=-1)

    def same_pose(self) -> Tensor:
        """(n,) bool; 0.01 degrees and Å are RELION's rounding."""
        return (self.angles() < 0.01) & (self.shifts() < 0.01)

    def pmax_error(self) -> Tensor:
        return (self.pmax[self.match] - self.table["rlnMaxValueProbDistribution"]).abs()


@dataclass(frozen=True)
class ClassPair(Pair):
    """The same of a classification."""

    before: ClassifyState
    ours: ClassifyState
    theirs: ClassifyState
    statistics: Statistics

    @property
    def beyond(self) -> float:
        """½ Σ|X|² beyond the window, mean over particles."""
        return float(self.statistics.sigma2[0][self.shells.stop :].sum()) / 2 / len(self.match)


@dataclass(frozen=True)
class Classification:
    """A classification of RELION's, whose iterations can be repeated."""

    data: Path
    kind: str  # folder: class2d, class3d
    params: ClassifyParams
    form: Form
    processes: Any  # by iteration: the process of each particle, the scales of each process
    group: str = "C1"

    def read(self, n: int) -> tuple[ClassifyState, Any]:
        """(state, particle set) after RELION's iteration n."""
        return read_classification(self.data / f"{self.kind}/run_it{n:03d}_optimiser.star", self.data)[:2]

    def scales(self, n: int) -> Tensor:
        """(processes, micrographs) float64."""
        return torch.tensor(self.processes[str(n)]["scales"], dtype=torch.float64)

    def repeat(self, n: int, prepare: Callable[[ClassifyState, ClassifyState, Tensor], ClassifyState], processes: bool) -> ClassPair:
        """Iteration n + 1 in float64 from the files of iteration n, as prepare(state, RELION's next state, match) leaves it."""
        (state, ours), (theirs, wanted) = self.read(n), self.read(n + 1)
        match = rows_of(wanted.image_names, ours.image_names)
        state = prepare(replace(state, model=replace(state.model, maps=state.model.maps.double())), theirs, match)
        if processes:
            particles = by_process(state.particles, process_of(ours.image_names, self.processes[str(n)]["process"]))
            state = replace(state, particles=particles, model=replace(state.model, scales=self.scales(n).reshape(-1)))
        engine = make_engine(self.params, dtype=torch.float64, relion_form=True)
        with kept_statistics(frazil.steps.classify) as kept:
            after = iterate(ClassifyJob(stack(self.data, ours.image_names), self.params, engine, self.form), state)
        columns = {label: torch.tensor(wanted.numbers(label)) for label in COLUMNS}
        return ClassPair((after.particles, theirs.particles), after.poses.pmax, match, columns, after.progress.size, self.group,
                         state, after, theirs, kept[0])  # fmt: skip

    def check_processes(self, n: int, of_mean: float, of_first: float) -> None:
        """The inferred scales obey what RELION does with scales, which was not used to infer them; how far they may be off."""
        state, particles = self.read(n)
        scales = self.scales(n)
        count = torch.bincount(state.particles.micrograph).double()
        assert (scales @ count / count.sum() - 1).abs().max() < of_mean  # normalised by the mean over all particles
        assert (scales[0] - state.model.scales).abs().max() < of_first
        members = torch.bincount(torch.tensor([int(c) for c in self.processes[str(n)]["process"]]))
        assert len(members) == 7 and members.min() > 90 and members.sum() == len(particles)


def worst(ours: Tensor, theirs: Tensor, shells: slice) -> float:
    """Largest relative difference over shells."""
    a, b = ours.reshape(-1)[shells], theirs.reshape(-1)[shells]
    return float(((a - b) / b).abs().max())


def map_fsc(a: Tensor, b: Tensor) -> Tensor:
    """(N/2+1,) correlation of two maps a shell."""
    k = torch.fft.fftfreq(BOX, 1 / BOX, dtype=torch.float64)
    shell = shell_round((k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2).sqrt()).long().flatten()
    fa, fb = (torch.fft.fftn(x.double()).flatten() for x in (a, b))
    cross, aa, bb = (torch.bincount(shell, v) for v in ((fa * fb.conj()).real, fa.abs().square(), fb.abs().square()))
    return (cross / (aa * bb).sqrt())[: BOX // 2 + 1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def relion_map(data: Tensor, weight: Tensor, tau2: Tensor) -> Tensor:
    """(N, N, N) masked map of prepared sums with T·τ² (N/2+1,), divided with RELION's edge.

    Voxels with |p| = P·r_max exactly get no prior; their weight is at least a thousandth of the mean of the shell before, which is the
    last that RELION averages.
    """
    m = data.shape[-1] - 1
    line = torch.arange(-m, m + 1, dtype=torch.float64)
    square = line[:, None, None] ** 2 + line[None, :, None] ** 2 + line[m:] ** 2
    inner, radius = square < (m - 1) ** 2, square.sqrt() / PAD
    prior = 1 / (PAD**3 * tau2[shell_round(radius).long().clamp(max=BOX // 2)].clamp(min=1e-30))
    full = weight + torch.where(inner & (radius >= 4.5), prior, 0)
    shell = radius.long().clamp(max=int((m - 1) / PAD) - 1)
    mean = torch.bincount(shell[inner], full[inner]) / torch.bincount(shell[inner])
    full = torch.maximum(full, mean[shell] / 1000)
    volume = torch.where((square <= (m - 1) ** 2) & (full > 0), data / full.clamp(min=1e-300), 0)
    density = mask_volume(map_from_half_volume(volume, PAD, BOX), BOX / 2, m_step.EDGE_PX)
    return m_step.flatten_solvent(density / sinc2(BOX, PAD, dtype=torch.float64), PIXEL, DIAMETER, 5.0, None)


def relion_averages(data: Tensor, weight: Tensor, tau2: Tensor) -> Tensor:
    """(K, N, N) masked class averages of half planes of sums with T·τ² (K, N/2+1), divided with RELION's edge: as `relion_map`."""
    m = data.shape[-1] - 1
    line = torch.arange(-m, m + 1, dtype=torch.float64)
    square = line[:, None] ** 2 + line[m:] ** 2
    inner, radius = square < (m - 1) ** 2, square.sqrt() / PAD
    prior = 1 / (PAD**2 * tau2[:, shell_round(radius).long().clamp(max=BOX // 2)].clamp(min=1e-30))
    full = hermitian_planes(weight) + torch.where(inner & (radius >= 4.5), prior, 0)
    shell = radius.long().clamp(max=int((m - 1) / PAD) - 1)
    mean = torch.stack([torch.bincount(shell[inner], f[inner]) for f in full]) / torch.bincount(shell[inner])
    full = torch.maximum(full, mean[:, shell] / 1000)
    ft = torch.where((square <= (m - 1) ** 2) & (full > 0), hermitian_planes(data) / full.clamp(min=1e-300), 0)
    maps = mask_images(images_from_planes(ft, PAD, BOX), BOX / 2, m_step.EDGE_PX)
    return flatten_planes(maps / sinc2(BOX, PAD, dtype=torch.float64, dims=2), PIXEL, DIAMETER, 5.0, None)
