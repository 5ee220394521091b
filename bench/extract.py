"""Speed of extraction: `PYTHONPATH=src python bench/extract.py [--device cuda] [--box 360] [--boxes 1000] [--size 4096] [--threads 2]`.

A simulated micrograph in the device's memory (a gradient and white noise), boxes at random places, some over its edge. Correctness first:
backgrounds have mean 0 and sd 1 (the bar is 1e-5), and images are those of the float64 reference. Then seconds for all boxes until the
float16 images are in main memory, disk apart: as they are, and cut to half their side in Fourier space. Lines go to
bench/results/extract.jsonl.
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.ops.boxes.reference import background  # noqa: E402
from frazil.ops.dispatch import set_threads  # noqa: E402
from frazil.steps.extract import BACKGROUND, ExtractSettings, extract, place  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "extract.jsonl"


def micrograph(size: int) -> Tensor:
    """(size, size) float32 counts around 1,000 with a gradient."""
    line = torch.arange(size, dtype=torch.float32)
    return 1000 + 0.02 * line[:, None] - 0.03 * line + 30 * torch.randn(size, size, generator=torch.Generator().manual_seed(1))


def check(image: Tensor, centre: Tensor, settings: ExtractSettings) -> dict[str, float]:
    """Largest background mean, error of its sd, and difference from float64, of the first boxes; raises AssertionError beyond the bar."""
    mask = background(settings.size, 0.5 * settings.background * settings.size / settings.box)[1]
    first = centre[:20]
    found = torch.cat([images.cpu() for _, images, _ in extract(image, first, settings)]).double()
    exact = torch.cat([images for _, images, _ in extract(image.double().cpu(), first, settings)])
    outside = found[:, mask]
    out = {"mean": float(outside.mean(1).abs().max()), "sd": float((outside.std(1, correction=0) - 1).abs().max()),
           "difference": float((found - exact).abs().max())}  # fmt: skip
    assert out["mean"] < 1e-5 and out["sd"] < 1e-5 and out["difference"] < 5e-4, out
    return out


def seconds(image: Tensor, centre: Tensor, settings: ExtractSettings) -> float:
    """Time until all images are float16 in main memory."""
    if image.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _, images, _ in extract(image, centre, settings):
        images.half().cpu()
    return time.perf_counter() - start


def main() -> None:
    """Check, time, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--box", type=int, default=360)
    parser.add_argument("--boxes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    set_threads(args.threads)
    image = micrograph(args.size).to(args.device)
    rng = torch.Generator().manual_seed(2)
    xy = args.size * torch.rand(args.boxes, 2, generator=rng, dtype=torch.float64)
    centre = place(xy, (args.size, args.size), args.box).centre
    name = torch.cuda.get_device_name() if image.is_cuda else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    for size in (args.box, args.box // 4 * 2):
        settings = ExtractSettings(args.box, size, BACKGROUND * args.box)
        line: dict[str, object] = {"bench": "extract", "commit": commit, "device": name, "threads": args.threads, "micrograph": args.size}
        line |= {"box": args.box, "rescaled": size, "boxes": args.boxes, **check(image, centre, settings)}
        taken = sorted(seconds(image, centre, settings) for _ in range(args.repeats))
        line |= {"seconds": taken[len(taken) // 2], "fastest": taken[0], "slowest": taken[-1]}
        if image.is_cuda:
            line["GB"] = torch.cuda.max_memory_reserved() / 1e9
        print(json.dumps(line), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
