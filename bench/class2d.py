"""Time of 2D classification on a simulated set of known classes: python bench/class2d.py [--device cuda] [--write].

First the check: on a small set, one EM iteration on the device against the float64 CPU reference from the same state (classes, averages).
Then the runs: all EM iterations, or VDAM with --method vdam, with the images read from memory; --real STAR takes real particles.
--write appends a JSON line a run to bench/results/class2d.jsonl.
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Images, Particles  # noqa: E402
from frazil.io.particles import open_images, read_particles  # noqa: E402
from frazil.ops import dispatch  # noqa: E402
from frazil.refine.residence import Stored, resident  # noqa: E402
from frazil.simulate.averages import agreement, particles_of, pictures  # noqa: E402
from frazil.steps.class2d import FORM, Class2dParams, class2d, initial_state, resolved  # noqa: E402
from frazil.steps.classify import ClassifyJob, iterate, make_engine  # noqa: E402

PIXEL = 3.54


def unposed(particles: Particles) -> Particles:
    """The particles without their poses."""
    n = len(particles)
    return replace(particles, rotation=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), shift=torch.zeros(n, 2, dtype=torch.float64))


def settings(box: int, pixel_size: float, **options) -> Class2dParams:
    """The parameters of a run, RELION's defaults otherwise."""
    return resolved(Class2dParams(diameter=0.88 * box * pixel_size, **options), pixel_size)


def check(device: str) -> float:
    """Largest relative error of an average after one iteration on the device, against float64 on the CPU; classes must agree."""
    generator = torch.Generator().manual_seed(2)
    truth = pictures(3, 48, generator)
    images, particles, _ = particles_of(truth, 240, PIXEL, 0.2, 1.0, generator)
    params = settings(48, PIXEL, classes=6, iterations=3, max_significant=-1)
    exact_job = ClassifyJob(Stored(images), params, make_engine(params, dtype=torch.float64, implementation="reference"), FORM)
    start = initial_state(exact_job, unposed(particles), PIXEL)
    for _ in range(2):
        start = iterate(exact_job, start)
    exact = iterate(exact_job, start)
    job = ClassifyJob(Stored(images), params, make_engine(params, device=device), FORM)
    fast = iterate(job, replace(start, model=replace(start.model, maps=start.model.maps.to(device, torch.float32))))
    same = float((fast.particles.klass == exact.particles.klass).double().mean())
    if same < 0.98:
        raise SystemExit(f"only {100 * same:.1f} % of the particles have the class of the float64 reference")
    error = (fast.model.maps.cpu().double() - exact.model.maps).flatten(1).norm(dim=1) / exact.model.maps.flatten(1).norm(dim=1)
    return float(error.max())


def measure(images: Images, particles: Particles, params: Class2dParams, pixel_size: float, arguments) -> dict[str, object]:
    """One run, timed from the first read of an image."""
    engine = make_engine(params, device=arguments.device, budget=int(arguments.memory * 1e9), seed=1)
    if engine.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    images, engine = resident(images, particles, engine)
    job = ClassifyJob(images, params, engine, FORM)
    state = initial_state(job, particles, pixel_size)
    started, each, phases = time.perf_counter() - begin, [], {}
    last = time.perf_counter()
    for state in class2d(job, state):  # noqa: B020 (the last state is what is left)
        if engine.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        each.append(now - last)
        last = now
        phases = {name: phases.get(name, 0.0) + state.seconds.get(name, 0.0) for name in {*phases, *state.seconds}}
    total = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 1e9 if engine.device != "cpu" else float("nan")
    return {
        "method": params.method, "classes": params.classes, "particles": len(particles), "box": state.model.box, "iterations": len(each),
        "seconds": total, "start": started, "first": each[0], "median": sorted(each)[len(each) // 2], "last": each[-1], "peak_gb": peak,
        "phases": {name: round(v, 3) for name, v in sorted(phases.items(), key=lambda item: -item[1]) if v > 0.005},
        "state": state,
    }  # fmt: skip


def main() -> None:
    """Check, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--particles", type=int, default=2374)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--kinds", type=int, default=10, help="pictures the particles are of")
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--method", choices=["em", "vdam"], default="em")
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--real", help="particle STAR file instead of simulated particles")
    parser.add_argument("--memory", type=float, default=8.0, help="GB to work in")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=2, help="runs; the first also compiles")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--write", action="store_true", help="append to bench/results/class2d.jsonl")
    arguments = parser.parse_args()
    dispatch.set_threads(arguments.threads)
    if not arguments.no_check:
        print(f"one iteration on {arguments.device} against float64: largest relative error of an average {check(arguments.device):.1e}")
    truth = None
    if arguments.real:
        table = read_particles(Path(arguments.real))
        particles, images = table.particles, open_images(table, memory_budget=4 << 30, threads=arguments.threads)
    else:
        generator = torch.Generator().manual_seed(1)
        kinds = pictures(arguments.kinds, arguments.box, generator)
        pixels, particles, truth = particles_of(kinds, arguments.particles, PIXEL, arguments.snr, 1.5, generator, arguments.device)
        images, particles = Stored(pixels), unposed(particles)
    optics = particles.optics[0]
    params = settings(optics.box, optics.pixel_size, classes=arguments.classes, method=arguments.method, iterations=arguments.iterations)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, {dispatch.threads()} threads"
    for _ in range(arguments.repeat):
        row = measure(images, particles, params, optics.pixel_size, arguments)
        state = row.pop("state")
        if truth is not None:
            row["agreement"] = agreement(state.particles.klass - 1, truth)  # pyright: ignore[reportAttributeAccessIssue]
        row |= {"commit": commit, "device": name, "real": bool(arguments.real), "torch": torch.__version__}
        print(json.dumps(row))
        if arguments.write:
            results = Path(__file__).parent / "results" / "class2d.jsonl"
            results.parent.mkdir(exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
