"""The production path (GPU float32, TF32 coarse products) against float64 on the CPU: python bench/precision.py [--device cuda]

One iteration of class3d repeated from the same state by both, and whole runs from the same seed. Prints the table of docs/precision.md;
--write appends to bench/results/precision.jsonl. Real set: --data FOLDER with particles.star, its stacks and ref.mrc (float32 map).
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import frazil.refine.expectation as e_step  # noqa: E402
from frazil.data import Images, Optics, Particles  # noqa: E402
from frazil.jobs.record import source_commit  # noqa: E402
from frazil.maths.fsc import fsc  # noqa: E402
from frazil.maths.masks import soft_sphere  # noqa: E402
from frazil.refine.residence import Stored, resident  # noqa: E402
from frazil.simulate.classes import simulate_classes  # noqa: E402
from frazil.simulate.particles import Settings  # noqa: E402
from frazil.steps.class3d import FORM, Class3dParams  # noqa: E402
from frazil.steps.classify import ClassifyJob, ClassifyState, initial_state, iterate, make_engine  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"


def sets(data: Path | None) -> dict[str, tuple[torch.Tensor, Particles, torch.Tensor, float, Class3dParams]]:
    """name → images, particles of unknown pose, reference, pixel size, parameters."""
    box, n = 64, 1000
    made = simulate_classes(n, Optics(4.0, box), 4, Settings(snr=0.05, seed=2))
    zero = torch.zeros(n, 2, dtype=torch.float64)
    unknown = replace(made.particles, rotation=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), shift=zero, klass=zero[:, 0].long())
    params = Class3dParams(classes=4, initial_lowpass=40, diameter=190, iterations=8, auto_sampling=False)
    out = {"simulated": (made.images, unknown, made.maps[0].data, 4.0, params)}
    if data is not None:
        from frazil.io.images import StackImages
        from frazil.io.mrc import read_map
        from frazil.io.particles import read_particles

        table = read_particles(data / "particles.star")
        images = StackImages(table.table["rlnImageName"].tolist(), data / "particles.star", memory_budget=1 << 30)
        reference = read_map(data / "ref.mrc")
        everything = images[torch.arange(len(table.particles))]
        params = Class3dParams(classes=4, initial_lowpass=40, diameter=200, iterations=8, offset_range=8, auto_sampling=False)
        out["beta-gal"] = (everything, table.particles, reference.data, reference.pixel_size, params)
    return out


def a_job(images: Images, particles: Particles, params: Class3dParams, device: str, dtype: torch.dtype) -> ClassifyJob:
    """The same job on a device and in a precision."""
    engine = make_engine(params, device=device, dtype=dtype, budget=8 << 30, seed=1)
    images, engine = resident(images, particles, engine)
    return ClassifyJob(images, params, engine, FORM)


def placed(state: ClassifyState, job: ClassifyJob) -> ClassifyState:
    """A state with its maps where the job works."""
    return replace(state, model=replace(state.model, maps=state.model.maps.to(job.engine.device, job.engine.dtype)))


def recorded(job: ClassifyJob, state: ClassifyState) -> tuple[ClassifyState, dict[int, dict[tuple[int, int, int], float]]]:
    """An iteration and the posterior weights of its fine samples: image → (orientation, child, shift) → Γ."""
    weights: dict[int, dict[tuple[int, int, int], float]] = {}
    plain, done = e_step.posterior, [0]

    def wrapped(step: Any, fine: Any, n: int):
        found = plain(step, fine, n)
        entry, child, small = torch.nonzero(found.gamma, as_tuple=True)
        orientation = fine.slices.orientation[:: step.grid.children][fine.orientation[entry]]
        shift = fine.shift[entry] * step.grid.shift_children + small
        rows = torch.stack([fine.image[entry] + done[0], orientation, child, shift], 1).tolist()
        for (image, *key), value in zip(rows, found.gamma[entry, child, small].tolist(), strict=True):
            weights.setdefault(image, {})[tuple(key)] = value
        done[0] += n
        return found

    e_step.posterior = wrapped
    try:
        return iterate(job, state), weights
    finally:
        e_step.posterior = plain


def distance(a: dict, b: dict) -> list[float]:
    """Σ|Γ_a − Γ_b| of each image."""
    return [sum(abs(a.get(i, {}).get(k, 0) - b.get(i, {}).get(k, 0)) for k in {*a.get(i, {}), *b.get(i, {})}) for i in sorted({*a, *b})]


def curves(a: torch.Tensor, b: torch.Tensor, shells: int) -> float:
    """Smallest FSC, inside a soft sphere, between like classes up to a shell."""
    mask, worst = soft_sphere(a.shape[-1], 0.42 * a.shape[-1], 0.06 * a.shape[-1], dtype=torch.float64), 1.0
    for x, y in zip(a.double().cpu(), b.double().cpu(), strict=True):
        if float(x.abs().max()) == 0 or float(y.abs().max()) == 0:
            continue
        worst = min(worst, float(fsc(x * mask, y * mask)[1 : shells + 1].amin()))
    return worst


def compare(name: str, given: tuple, device: str, ahead: int, runs: bool) -> dict[str, Any]:
    """One iteration after `ahead` of them, by both; then, with `runs`, whole runs by both."""
    images, particles, reference, pixel_size, params = given
    fast = a_job(Stored(images), particles, params, device, torch.float32)
    exact = a_job(Stored(images), particles, params, "cpu", torch.float64)
    state = initial_state(fast, particles, reference[None], pixel_size)
    for _ in range(ahead):
        state = iterate(fast, state)
    (a, wa), (b, wb) = recorded(fast, placed(state, fast)), recorded(exact, placed(state, exact))
    gamma = torch.tensor(distance(wa, wb))
    shell = b.progress.shell  # what the run itself calls its resolution
    row: dict[str, Any] = {
        "set": name, "iteration": ahead + 1, "particles": len(particles), "classes": params.classes,
        "gamma_l1_mean": float(gamma.mean()), "gamma_l1_above_0.05": float((gamma > 0.05).double().mean()),
        "map_fsc_min": curves(a.model.maps, b.model.maps, shell), "pmax_max_difference": float((a.poses.pmax - b.poses.pmax).abs().max()),
        "class_differs": float((a.poses.klass != b.poses.klass).double().mean()), "shells": shell,
        "log_likelihood_relative": abs(a.model.log_likelihood - b.model.log_likelihood) / abs(b.model.log_likelihood),
        "sigma2_relative": float((a.model.sigma2[0] / b.model.sigma2[0] - 1).abs().max()),
    }  # fmt: skip
    if not runs:
        return row
    seconds, finals = [], []
    for job in (fast, exact):
        start = time.perf_counter()
        last = initial_state(job, particles, reference[None], pixel_size)
        for _ in range(params.iterations):
            last = iterate(job, last)
        seconds.append(time.perf_counter() - start)
        finals.append(last)
    a, b = finals
    row |= {
        "run_iterations": params.iterations, "run_class_differs": float((a.poses.klass != b.poses.klass).double().mean()),
        "run_map_fsc_min": curves(a.model.maps, b.model.maps, min(a.progress.shell, b.progress.shell)),
        "run_occupancy_difference": float((a.model.pdf_class - b.model.pdf_class).abs().max()),
        "run_fsc": [fsc(x.double().cpu(), y.double().cpu()).tolist() for x, y in zip(a.model.maps, b.model.maps, strict=True)],
        "seconds": seconds,
    }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--no-runs", action="store_true", help="single iterations only")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    for which, given in sets(args.data).items():
        for ahead in (2, 5):
            found = compare(which, given, args.device, ahead, runs=ahead == 2 and not args.no_runs)
            row = {"bench": "precision", "commit": source_commit(), "device": name, **found}
            print({k: v for k, v in row.items() if k != "run_fsc"}, flush=True)
            if args.write:
                with args.write.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
