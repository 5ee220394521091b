"""Whole refinements of small simulated sets against the truth they were made from (spec/refinement 9.2)."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.pipeline.oracle import moved_truth, plain_fsc, sphere, true_pose_map
from torch import Tensor

from frazil.data import Optics, Volume
from frazil.io.mrc import read_map
from frazil.io.particles import match_by_image_name, read_particles
from frazil.maths.symmetry import operators
from frazil.simulate import ImageStacks, Phantom, Settings, Simulated, compare_poses, phantom, simulate_particles
from frazil.steps.refine3d import Job, Refine3dParams, State, initial_state, make_engine, refine3d

pytestmark = pytest.mark.slow
BOX, PIXEL, LOW = 32, 5.0, 25.0  # 25 Å is shell 6 of 16
REPOSITORY = Path(__file__).resolve().parents[2]


def simulated(
    symmetry: str = "C1", n: int = 200, optics: list[Optics] | None = None, box: int = BOX, **settings: float
) -> tuple[Phantom, Simulated]:
    """A phantom and particles of it, well visible unless said otherwise."""
    shape = phantom(box, PIXEL, symmetry, seed=2)
    chosen = Settings(**{"snr": 1.0, "shift_sd": 4.0, "per_micrograph": 40, "seed": 4, **settings})
    return shape, simulate_particles(shape, n, optics or [Optics(PIXEL, box)], chosen)


def start(made: Simulated, images: ImageStacks | None = None, **params: object) -> tuple[Job, State]:
    """A job on simulated particles that knows no pose, and its state before the first iteration: the low-passed truth."""
    small = {"initial_lowpass": LOW, "offset_range": 3.0, "max_order": 3, "local_from_order": 3}
    small["diameter"] = 0.75 * made.truth.data.shape[-1] * PIXEL
    settings = Refine3dParams(**{**small, **params})
    n = len(made.particles)
    eye = torch.eye(3, dtype=torch.float64).expand(n, 3, 3).contiguous()
    blind = replace(made.particles, rotation=eye, shift=torch.zeros(n, 2, dtype=torch.float64))
    job = Job(images or made.images, settings, make_engine(settings))
    return job, initial_state(job, blind, Volume(made.truth.data.clone(), made.truth.pixel_size))


def refined(made: Simulated, images: ImageStacks | None = None, **params: object) -> State:
    """The last state of a refinement."""
    *_, last = refine3d(*start(made, images, **params))
    return last


def judged(shape: Phantom, made: Simulated, last: State, group: str = "C1") -> tuple[Tensor, Tensor, Tensor]:
    """(FSC to truth, FSC to truth of the map from true poses, angular errors in degrees); the common move of the map is taken out."""
    assert last.progress.converged and last.joined is not None and last.unfiltered is not None
    left = compare_poses(made.particles, last.particles, operators(group))
    box = made.truth.data.shape[-1]
    truth = moved_truth(shape, left, box, PIXEL)
    mask = sphere(box)
    return plain_fsc(last.joined.maps[0], truth, mask), plain_fsc(true_pose_map(made, group=group), made.truth.data, mask), left.angle


def test_refinement_finds_the_map_that_true_poses_give():
    shape, made = simulated(scale_sd=0.15)
    last = refined(made, max_order=4, local_from_order=4)
    found, best, angle = judged(shape, made, last)
    where = best > 0.5
    assert int(where.sum()) > 10
    assert (best - found)[where].max() < 0.03
    assert angle.median() < 1.5 * max(last.progress.accuracy_rotation, last.sampling.step)
    shift = compare_poses(made.particles, last.particles, operators("C1")).shift
    assert shift.median() < 0.3 * PIXEL
    # Scales of micrographs, from 20 particles in each half.
    for model in last.models:
        assert (model.scales / made.scale - 1).abs().max() < 0.07
    assert torch.corrcoef(torch.stack([last.models[0].scales, made.scale]))[0, 1] > 0.9


@pytest.mark.parametrize("group", ["C4", "D2", "D7", "T", "O"])
def test_symmetric_particles_refine_alike_with_and_without_their_symmetry(group):
    # Enough views that C1 fills Fourier space too: 200 leave gaps, since equivalent poses crowd into one asymmetric unit.
    shape, made = simulated(group, n=800, snr=2.0)
    runs = {name: refined(made, symmetry=name) for name in ("C1", group)}
    for name, last in runs.items():
        found, best, angle = judged(shape, made, last, group)
        assert found[:9].min() > 0.97 and (best - found)[:9].max() < 0.03, name
        assert angle.median() < last.sampling.step, name
    one, many = runs.values()
    assert compare_poses(many.particles, one.particles, operators(group)).angle.median() < 1.2 * many.sampling.step
    assert plain_fsc(one.joined.maps[0], many.joined.maps[0], sphere(BOX))[:9].min() > 0.96


def test_icosahedral_particles():
    """Sixty mates in a small ball: a larger box, and no C1 run, which would need many more views."""
    shape, made = simulated("I", n=300, box=48)
    found, best, angle = judged(shape, made, refined(made, symmetry="I"), "I")
    assert found[:12].min() > 0.96 and (best - found)[:12].max() < 0.04
    assert angle.median() < 7.0


def test_two_optics_groups_are_as_good_as_one():
    shape, made = simulated(optics=[Optics(PIXEL, BOX), Optics(4.5, 40, voltage=200.0, cs=1.4)])
    last = refined(made)
    found, best, angle = judged(shape, made, last)
    assert found[:9].min() > 0.92 and (best - found)[:9].max() < 0.06
    for g in range(2):
        assert angle[made.particles.group == g].median() < 6.0
    assert [len(s) for s in last.models[0].sigma2] == [17, 21]


def noise_only(made: Simulated) -> ImageStacks:
    """As many images of white noise."""
    rng = torch.Generator().manual_seed(11)
    return ImageStacks((torch.randn(made.images.stacks[0].shape, generator=rng),), made.images.group, made.images.place)


def scrambled(made: Simulated) -> ImageStacks:
    """The images with the phases of noise and their own amplitudes."""
    other = torch.fft.rfft2(noise_only(made).stacks[0])
    ft = torch.fft.rfft2(made.images.stacks[0]).abs() * other / other.abs().clamp(min=1e-12)
    return ImageStacks((torch.fft.irfft2(ft, s=(BOX, BOX)),), made.images.group, made.images.place)


@pytest.mark.parametrize("spoil", [noise_only, scrambled])
def test_noise_gives_no_resolution_beyond_the_initial_lowpass(spoil):
    _, made = simulated("D2", n=100)
    few = {"symmetry": "D2", "max_order": 2, "iterations": 5}
    last = refined(made, spoil(made), **few)
    curve = last.models[0].fsc
    first = round(BOX * PIXEL / LOW)
    beyond = curve[first + 2 : 15]
    assert beyond.mean().abs() < 0.08 and beyond.max() < 0.3, curve.tolist()
    assert last.progress.shell <= first + 2
    # The same set unspoilt goes far beyond, so the bound above says something.
    assert refined(made, **few).models[0].fsc[first + 2] > 0.4


def run_cli(*arguments: object) -> subprocess.Popen[str]:
    """A frazil process."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "frazil", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; fails with its errors unless it ended well."""
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out


def iterations(run: Path) -> list[int]:
    """Numbers of the iterations that the run has recorded."""
    if not (run / "events.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    return [e["iteration"] for e in lines if e["event"] == "iteration"]


def test_killed_run_resumes_to_the_same_map(tmp_path):
    data = tmp_path / "data"
    finish(run_cli("simulate", "--output", data, "--particles", 160, "--box", BOX, "--pixel-size", PIXEL, "--symmetry", "D2", "--snr", 1,
                   "--lowpass", LOW, "--seed", 4, "--quiet"))  # fmt: skip
    common = ["refine3d", data / "particles.star", "--reference", data / "reference_lowpass.mrc", "--initial-lowpass", LOW,
              "--symmetry", "D2", "--diameter", 120, "--local-from-order", 3, "--max-order", 3, "--threads", 1, "--seed", 1]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert "resolution" in finish(run_cli(*common, "--output", whole))
    process = run_cli(*common, "--output", broken)
    while len(iterations(broken)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "run_class001.mrc").exists()
    finish(run_cli(*common, "--output", broken, "--resume"))
    assert iterations(broken)[-1] == iterations(whole)[-1]
    for name in ("run_class001.mrc", "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"):
        curve = plain_fsc(read_map(whole / name).data, read_map(broken / name).data)
        assert curve.min() > 0.999
    a, b = (read_particles(run / "run_data.star") for run in (whole, broken))
    i, j = match_by_image_name(a, b)
    assert len(i) == 160 and (a.particles.rotation[i] - b.particles.rotation[j]).abs().max() < 1e-5
    # The truth is known too: the table of poses that was not given to the run.
    truth = read_particles(data / "truth.star")
    i, j = match_by_image_name(truth, a)
    assert len(i) == 160
    assert compare_poses(truth.particles[i], a.particles[j], operators("D2")).angle.median() < 5.0
