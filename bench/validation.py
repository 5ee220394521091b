"""Is the map right? `python bench/validation.py [--device cuda] [--only noise poses symmetry] [--data FOLDER] [--small]`.

noise     the real particles with scrambled phases, with scrambled content, and pure noise, refined as if they were particles: the FSC of
          the halves must stay at noise level beyond the low-resolution join (40 Å), or the halves leak into each other.
poses     simulated particles, SNR 0.05: pose errors beside the accuracy the run itself expects; FSC to the truth, turned and moved into the
          frame the refinement ended in, beside those of reconstructions from the true poses, and from true poses with random errors
          as large as the errors found (what pose errors alone must cost).
symmetry  C1, C4, D2, D7, T, O, I: refined with the group and without; the maps must agree.

Each measurement is a line of bench/results/validation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from frazil.data import Optics, Particles, Volume
from frazil.io.mrc import read_map
from frazil.io.particles import open_images, read_particles
from frazil.maths.filters import lowpass_map
from frazil.maths.fsc import fsc, resolution_at
from frazil.maths.masks import soft_sphere
from frazil.maths.rotation import rotation_angle
from frazil.maths.symmetry import operators
from frazil.refine.residence import Stored
from frazil.simulate import PoseDifference, Settings, compare_poses, density, phantom, simulate_particles
from frazil.steps.reconstruct import ReconstructParams, make_target, reconstruct_poses
from frazil.steps.refine3d import Job, Refine3dParams, State, initial_state, make_engine, refine3d

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "validation.jsonl"


def refine(images, particles: Particles, reference: Volume, device: str, **params) -> tuple[State, float]:
    """Final state and seconds of a refinement."""
    start = time.perf_counter()
    settings = Refine3dParams(**params)
    job = Job(images, settings, make_engine(settings, device=device, budget=8 << 30, seed=1))
    state = initial_state(job, unposed(particles), reference)
    states = [state, *refine3d(job, state)]
    return states[-1], time.perf_counter() - start


def unposed(particles: Particles) -> Particles:
    """The particles as they come from extraction: nothing known of poses and halves."""
    n = len(particles)
    eye = torch.eye(3, dtype=torch.float64).expand(n, 3, 3).clone()
    return replace(particles, rotation=eye, shift=torch.zeros(n, 2, dtype=torch.float64), half=torch.zeros(n, dtype=torch.int64))


def record(name: str, device: str, **values) -> None:
    """Print a measurement and append it to the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPOSITORY).stdout.strip() or None
    where = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{platform.processor() or platform.machine()} {torch.get_num_threads()} threads"
    )
    line = {"bench": "validation", "name": name, "commit": commit, "device": where, **values}
    print(json.dumps(line), flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def rounded(curve: Tensor) -> list[float]:
    """A curve in three decimals."""
    return [round(float(x), 3) for x in curve]


def noise(device: str, folder: Path, small: bool) -> None:
    """Curves of data that hold no structure."""
    table = read_particles(folder / "particles.star")
    particles = table.particles
    index = torch.arange(0, len(particles), 8 if small else 1)
    particles = particles[index]
    images = open_images(table)[index]
    reference = lowpass_map(read_map(folder / "ref.mrc").data, 3.54, 40)
    generator = torch.Generator().manual_seed(7)
    random = torch.randn(images.shape, generator=generator)
    ft, other = torch.fft.rfft2(images), torch.fft.rfft2(random)
    phases = torch.fft.irfft2(ft.abs() * other / other.abs(), s=images.shape[-2:])
    pixels = images.flatten(1)[:, torch.randperm(images[0].numel(), generator=generator)].view_as(images)
    common = {"initial_lowpass": 40, "symmetry": "D2", "diameter": 200, "iterations": 3 if small else 999}
    for name, data in (("phases scrambled", phases), ("pixels scrambled", pixels), ("pure noise", random)):
        state, seconds = refine(Stored(data), particles, Volume(reference, 3.54), device, **common)
        curve = state.models[0].fsc if state.unfiltered is None else fsc(*(x.double() for x in state.unfiltered))
        found = {"resolution": float(resolution_at(curve, 0.143, 64, 3.54)), "beyond_join": float(curve[8:].abs().mean())}
        record(
            f"noise: {name}", device, particles=len(particles), iterations=state.progress.iteration, fsc=rounded(curve),
            seconds=round(seconds, 2), **{key: round(value, 3) for key, value in found.items()},
        )  # fmt: skip


def poses(device: str, small: bool) -> None:
    """Pose errors and FSC to the truth at SNR 0.05."""
    for box, a, n in ((48, 4.0, 400),) if small else ((64, 3.0, 3000), (128, 1.5, 3000)):
        shape = phantom(box, a, "C1", 3)
        made = simulate_particles(shape, n, [Optics(a, box)], Settings(snr=0.05, per_micrograph=100, seed=5))
        reference = Volume(lowpass_map(made.truth.data.float(), a, 40), a)
        diameter = 0.8 * box * a
        state, seconds = refine(
            made.images, made.particles, reference, device, initial_lowpass=40, diameter=diameter, iterations=3 if small else 999
        )
        difference = compare_poses(made.particles, state.particles, operators("C1"))
        mask = soft_sphere(box, 0.42 * box, 0.06 * box, dtype=torch.float64)
        truth = made.truth.data.double() * mask
        moved = density(shape.moved(difference.rotation, difference.translation), box, a).data.double() * mask
        found = (state.joined or state.models[0]).maps[0].double() * mask
        target = make_target(box, a, ReconstructParams(symmetry="C1"))
        ideal = fsc(reconstruct_poses(made.images, made.particles, target).double() * mask, truth)
        spoilt = fsc(reconstruct_poses(made.images, with_errors(made.particles, difference), target).double() * mask, truth)
        ours, good = fsc(found, moved), ideal > 0.5
        record(
            f"known poses, box {box}", device, particles=n, snr=0.05, iterations=state.progress.iteration, seconds=round(seconds, 2),
            median_error=round(float(difference.angle.median()), 3), expected_accuracy=round(state.progress.accuracy_rotation, 3),
            median_shift=round(float(difference.shift.median()), 3), expected_shift=round(state.progress.accuracy_shift, 3),
            worst_fsc_loss=round(float((ideal - ours)[good].max()), 3),
            worst_loss_of_pose_errors=round(float((ideal - spoilt)[good].max()), 3),
            fsc=rounded(ours), fsc_true_poses=rounded(ideal), fsc_true_poses_with_errors=rounded(spoilt),
            frame=[round(float(rotation_angle(difference.rotation, torch.eye(3, dtype=torch.float64))), 3),
                   round(float(difference.translation.norm()), 3)],
        )  # fmt: skip


def with_errors(particles: Particles, difference: PoseDifference) -> Particles:
    """True poses with random errors of the sizes found: each particle's angle about a random axis, its shift in a random direction."""
    rng, n = torch.Generator().manual_seed(11), len(particles)
    axis = torch.nn.functional.normalize(torch.randn(n, 3, generator=rng, dtype=torch.float64), dim=-1)
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(n, 3, 3)
    turn = torch.matrix_exp(cross * torch.deg2rad(difference.angle)[:, None, None])
    phi = 2 * torch.pi * torch.rand(n, generator=rng, dtype=torch.float64)
    moved = particles.shift + difference.shift[:, None] * torch.stack([phi.cos(), phi.sin()], -1)
    return replace(particles, rotation=particles.rotation @ turn, shift=moved)


def symmetry(device: str, small: bool, groups: list[str]) -> None:
    """Each group against its own C1 refinement. High groups start from a finer map: a blurred one has no hand."""
    box, a = (32, 6.0) if small else (64, 3.5)
    for group in ("C4",) if small else groups:
        filtered = 16 if group in "TOI" else 30
        made = simulate_particles(
            phantom(box, a, group, 2), 150 if small else 1500, [Optics(a, box)], Settings(snr=0.1, per_micrograph=100, seed=9)
        )
        reference = Volume(lowpass_map(made.truth.data.float(), a, filtered), a)
        mask = soft_sphere(box, 0.42 * box, 0.06 * box, dtype=torch.float64)
        truth, maps = made.truth.data.double() * mask, {}
        for used in dict.fromkeys((group, "C1")):
            settings = {"symmetry": used, "initial_lowpass": filtered, "diameter": 0.85 * box * a, "iterations": 3 if small else 999}
            state, seconds = refine(made.images, made.particles, reference, device, **settings)
            maps[used] = (state.joined or state.models[0]).maps[0].double() * mask
            angle = compare_poses(made.particles, state.particles, operators(group)).angle
            curve = fsc(maps[used], truth)
            record(
                f"symmetry {group} refined in {used}", device, converged=state.progress.converged, iterations=state.progress.iteration,
                seconds=round(seconds, 2), resolution=round(box * a / state.progress.shell, 2),
                median_error=round(float(angle.median()), 3),
                step=state.sampling.step, fsc_truth_05=round(float(resolution_at(curve, 0.5, box, a)), 2),
                agreement=rounded(fsc(maps[used], maps[group])),
            )  # fmt: skip


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=["noise", "poses", "symmetry"])
    parser.add_argument("--data", type=Path, default=None, help="folder with particles.star, its stacks, and ref.mrc (noise)")
    parser.add_argument("--groups", nargs="*", default=["C1", "C4", "D2", "D7", "T", "O", "I"])
    parser.add_argument("--small", action="store_true", help="a few particles and iterations: does it run")
    args = parser.parse_args()
    if "noise" in args.only and args.data:
        noise(args.device, args.data, args.small)
    if "poses" in args.only:
        poses(args.device, args.small)
    if "symmetry" in args.only:
        symmetry(args.device, args.small, args.groups)


if __name__ == "__main__":
    main()
