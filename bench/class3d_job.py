"""The whole of `frazil class3d` from files, as a user runs it: python bench/class3d_job.py [--device cuda] [--folder F] [--write].

Writes a benchmark-shaped set (float16 stack, STAR file, reference) to a folder, then runs 25 iterations of the standard benchmark's
settings as a command and times it: start-up, reading, iterations, writing, report.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.io.mrc import write_mrc  # noqa: E402
from frazil.io.particles import make_particle_set, write_particles  # noqa: E402
from frazil.jobs.record import source_commit  # noqa: E402
from frazil.simulate.classes import simulate_classes  # noqa: E402
from frazil.simulate.particles import Settings  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "class3d_job.jsonl"


def write_set(folder: Path, particles: int, box: int, pixel_size: float, classes: int, device: str) -> None:
    """particles.star, particles.mrcs and reference.mrc in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = simulate_classes(particles, Optics(pixel_size, box), classes, Settings(snr=0.03), device=device, dtype=torch.float16)
    write_mrc(folder / "particles.mrcs", made.images.cpu(), pixel_size, "float16", stack=True)
    write_mrc(folder / "reference.mrc", made.maps[0].data, pixel_size)
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(particles)]
    write_particles(folder / "particles.star", make_particle_set(made.particles, names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/frazil-class3d"))
    parser.add_argument("--particles", type=int, default=8000)
    parser.add_argument("--box", type=int, default=360)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS)
    args = parser.parse_args()
    pixel_size = 1.34 * 360 / args.box
    write_set(args.folder, args.particles, args.box, pixel_size, args.classes, args.device)
    run = args.folder / f"run{int(time.time())}"
    command = [
        sys.executable, "-m", "frazil", "class3d", args.folder / "particles.star", "--reference", args.folder / "reference.mrc",
        "--classes", args.classes, "--iterations", args.iterations, "--tau-fudge", 4, "--initial-lowpass", 60, "--diameter", 320,
        "--no-auto-sampling", "--device", args.device, "--seed", 1, "--output", run,
    ]  # fmt: skip
    start = time.perf_counter()
    here = str(Path(__file__).resolve().parents[1] / "src")
    paths = [here, *(str(Path(part).resolve()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([str(part) for part in command], check=True, cwd=args.folder, env=environment)
    seconds = time.perf_counter() - start
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    iterations = [event["seconds"] for event in events if event["event"] == "iteration"]
    row = {
        "bench": "class3d_job", "commit": source_commit(), "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "particles": args.particles, "box": args.box, "classes": args.classes, "iterations": args.iterations, "seconds": seconds,
        "in_iterations": sum(iterations),
    }  # fmt: skip
    print(row)
    if args.write:
        with args.write.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
