"""Alignment of two maps: python bench/align.py [--box 128] [--repeats 3] [--device cuda] [--write].

A phantom, in random orientation, shifted by up to 15 px, every second time mirrored, is brought back. Error first (the bar is 0.2
degrees and 0.1 px), then the seconds. --write appends a line to bench/results/align.jsonl.
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

from frazil.maths.rotation import random_rotations, rotation_angle  # noqa: E402
from frazil.simulate.phantom import density, phantom  # noqa: E402
from frazil.steps.align import align, hand_matrix  # noqa: E402

PIXEL = 2.0


def measure(box: int, repeats: int, device: str) -> dict[str, object]:
    """Worst errors and the seconds of every repeat; raises AssertionError where the hand is wrong or the bar is missed."""
    rng, shape = torch.Generator().manual_seed(1), phantom(box, PIXEL, seed=3)
    target = density(shape, box, PIXEL).data.to(device)
    angles, shifts, seconds = [], [], []
    for i in range(repeats):
        turn, by = random_rotations(1, rng)[0], (torch.rand(3, generator=rng, dtype=torch.float64) - 0.5) * 30
        moving = density(replace(shape, centre=(shape.centre - by * PIXEL) @ turn @ hand_matrix(i % 2 == 1)), box, PIXEL).data.to(device)
        if device.startswith("cuda") and i == 0:
            align(target, moving)  # what is set up on first use
        start, cpu = time.perf_counter(), time.process_time()
        found = align(target, moving)
        seconds.append(time.perf_counter() - start)
        angles.append(float(rotation_angle(found.rotation, turn)))
        shifts.append(float((found.shift - by).norm()))
        cpu = time.process_time() - cpu
        print(f"{i}: {angles[-1]:.5f} degrees, {shifts[-1]:.5f} px, mirrored {found.mirrored}, {seconds[-1]:.2f} s ({cpu:.1f} s of CPU)")
        assert found.mirrored == (i % 2 == 1) and angles[-1] < 0.2 and shifts[-1] < 0.1
    return {"degrees": max(angles), "px": max(shifts), "seconds": sorted(seconds)[len(seconds) // 2], "slowest": max(seconds)}


def main() -> None:
    """Measure, print, and append a line if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {"bench": "align", "commit": commit, "device": name, "threads": options.threads, "box": options.box}
    row |= measure(options.box, options.repeats, options.device)
    print(json.dumps(row))
    if options.write:
        with open(Path(__file__).parent / "results" / "align.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
