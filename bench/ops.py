"""Speed of the hot loops, each against the plain reference: python bench/ops.py [--device cuda] [--only project] [--write].

Correctness first (relative L2 error to the float64 reference on a few slices), then the fastest of some repeats: the machine
may be shared, so compare figures of one run only. --write appends a JSON line a measurement to bench/results/ops.jsonl.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.maths.fourier import make_hermitian, pixel_list  # noqa: E402
from frazil.maths.rotation import euler_to_matrix, random_rotations  # noqa: E402
from frazil.ops import dispatch  # noqa: E402
from frazil.ops.insert import insert_  # noqa: E402
from frazil.ops.project import project  # noqa: E402
from frazil.ops.symmetrise import symmetrise  # noqa: E402

PAD = 2.0
Row = dict[str, object]


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Fastest of some repeats, after one that compiles."""
    work()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def error(value: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((value.to(exact) - exact).norm() / exact.norm())


def orientations(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """'random': no order at all. 'grid': 48 in-plane angles for each direction, as a sampling lists them."""
    psi = torch.arange(n, dtype=torch.float64) % 48 * 7.5
    directions = random_rotations(n // 48 + 1, generator).repeat_interleave(48, 0)[:n]
    inplane = euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1))
    return {"random": random_rotations(n, generator), "grid": inplane @ directions}


def window(box: int) -> Tensor:
    """Coords of all slice pixels of a box."""
    pixels = pixel_list(box, box)
    return pixels.k()[: pixels.inside]


def half_volume(m: int, generator: torch.Generator, device: str, dtype: torch.dtype = torch.complex64) -> Tensor:
    """Random half volume with a Hermitian x = 0 plane."""
    return make_hermitian(torch.randn(2 * m + 1, 2 * m + 1, m + 1, dtype=dtype, generator=generator)).to(device)


def cases(device: str) -> list[tuple[int, int]]:
    """(box, slices) that make a call of about a tenth of a second."""
    return [(48, 60000), (96, 30000), (192, 8000), (360, 2000)] if device == "cuda" else [(64, 3000), (128, 1000)]


def bench_project(device: str, generator: torch.Generator) -> Iterator[Row]:
    """Slices, all pixels of the box at padding 2."""
    for box, n in cases(device):
        m, k = box + 1, window(box).to(device)
        volume = half_volume(m, generator, device)
        for order, r in orientations(n, generator).items():
            r = r.to(device)
            out = torch.empty(n, len(k), dtype=volume.dtype, device=device)
            fast = seconds(lambda v=volume, r=r, k=k, o=out: project(v, r, k, PAD, out=o), device)
            few = max(1, n // 200)
            plain = seconds(lambda v=volume, r=r[:few], k=k: project(v, r, k, PAD, implementation="reference"), device, 1) * n / few
            exact = project(volume.to(torch.complex128), r[:4], k, PAD, implementation="reference")
            yield row("project", f"box {box}, {n} slices, {order}", fast, n * len(k), plain / fast, error(out[:4], exact))


def bench_insert(device: str, generator: torch.Generator) -> Iterator[Row]:
    """Insertion of as much; into complex64, and on the CPU into complex128 too."""
    for box, n in cases(device):
        m, k = box + 1, window(box).to(device)
        values = torch.randn(n, len(k), dtype=torch.complex64, generator=generator).to(device)
        weights = torch.rand(n, len(k), generator=generator).to(device)
        for order, r in orientations(n, generator).items():
            r = r.to(device)
            for dtype in (torch.complex64, torch.complex128)[: 1 if device == "cuda" else 2]:
                data = torch.zeros(2 * m + 1, 2 * m + 1, m + 1, dtype=dtype, device=device)
                weight = torch.zeros_like(data.real)
                work = (data, weight, values, weights, r, k, PAD)
                fast = seconds(lambda w=work: insert_(*w), device)
                few = max(1, n // 200)
                part = (data, weight, values[:few], weights[:few], r[:few], k, PAD)
                plain = seconds(lambda w=part: insert_(*w, implementation="reference"), device, 1) * n / few
                pair = []
                for kind, how in ((dtype, None), (torch.complex128, "reference")):
                    pair.append(torch.zeros_like(data, dtype=kind))
                    four = [values[:4].to(kind), weights[:4].to(pair[-1].real.dtype)] if how else [values[:4], weights[:4]]
                    insert_(pair[-1], torch.zeros_like(pair[-1].real), *four, r[:4], k, PAD, implementation=how)
                shape = f"box {box}, {n} slices, {order}, into {str(dtype).removeprefix('torch.')}"
                yield row("insert", shape, fast, n * len(k), plain / fast, error(pair[0], pair[1]))


def bench_planes(device: str, generator: torch.Generator) -> Iterator[Row]:
    """A stack of 50 half planes (2D classes): slices of all in one call, and their insertion."""
    for box, n in cases(device):
        m, k = box + 1, window(box).to(device)
        stack = torch.randn(50, 2 * m + 1, m + 1, dtype=torch.complex64, generator=generator).to(device)
        psi = torch.rand(n, generator=generator, dtype=torch.float64) * 360
        r = euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1)).to(device)
        which = (torch.arange(n) * 50 // n).to(device)
        slices = project(stack, r, k, PAD, which=which)
        fast = seconds(lambda v=stack, r=r, k=k, w=which, o=slices: project(v, r, k, PAD, which=w, out=o), device)
        few = max(1, n // 200)
        part = (stack, r[:few], k, PAD)
        plain = seconds(lambda p=part, w=which[:few]: project(*p, which=w, implementation="reference"), device, 1) * n / few
        exact = project(stack.to(torch.complex128), r[:4], k, PAD, which=which[:4], implementation="reference")
        yield row("project", f"50 planes of box {box}, {n} slices", fast, n * len(k), plain / fast, error(slices[:4], exact))
        data, weights = torch.zeros_like(stack), torch.rand(n, len(k), generator=generator).to(device)
        weight = torch.zeros_like(data.real)
        work = (data, weight, slices, weights, r, k, PAD)
        fast = seconds(lambda a=work, w=which: insert_(*a, which=w), device)
        part = (data, weight, slices[:few], weights[:few], r[:few], k, PAD)
        plain = seconds(lambda a=part, w=which[:few]: insert_(*a, which=w, implementation="reference"), device, 1) * n / few
        pair = [torch.zeros_like(data), torch.zeros_like(data, dtype=torch.complex128)]
        for target, how in zip(pair, (None, "reference"), strict=True):
            four = (slices[:4].to(target.dtype), weights[:4].to(target.real.dtype), r[:4], k, PAD)
            insert_(target, torch.zeros_like(target.real), *four, which=which[:4], implementation=how)
        yield row("insert", f"50 planes of box {box}, {n} slices", fast, n * len(k), plain / fast, error(*pair))


def bench_symmetrise(device: str, generator: torch.Generator) -> Iterator[Row]:
    """60 operators, as an icosahedral group has; random ones cost the same."""
    group = random_rotations(60, generator)
    group[0] = torch.eye(3, dtype=torch.float64)
    for m in (65, 130, 260) if device == "cuda" else (65, 130):
        for dtype in (torch.complex64, torch.complex128):
            data = half_volume(m, generator, device, dtype)
            weight = data.real.abs().contiguous()
            fast = seconds(lambda d=data, w=weight: symmetrise(d, w, group), device, 2)
            plain = seconds(lambda d=data, w=weight: symmetrise(d, w, group[:3], implementation="reference"), device, 1) * 59 / 2
            exact = symmetrise(data.to(torch.complex128), weight.double(), group[:3], implementation="reference")[0]
            wrong = error(symmetrise(data, weight, group[:3])[0], exact)
            gathers = 59 * int(2 / 3 * torch.pi * (m - 1) ** 3)
            yield row("symmetrise", f"M {m}, 60 operators, {str(dtype).removeprefix('torch.')}", fast, gathers, plain / fast, wrong)


def row(op: str, shape: str, took: float, samples: int, speedup: float, wrong: float) -> Row:
    """One measurement; samples are pixels, or gathers of symmetrise."""
    return {"op": op, "shape": shape, "seconds": took, "msamples_per_s": samples / took / 1e6, "times_reference": speedup, "error": wrong}


BENCHES: dict[str, Callable[[str, torch.Generator], Iterator[Row]]] = {
    "project": bench_project,
    "insert": bench_insert,
    "planes": bench_planes,
    "symmetrise": bench_symmetrise,
}


def about(device: str) -> Row:
    """Where and when a figure was taken."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {dispatch.threads()} threads"
    return {"commit": commit, "device": name, "load": os.getloadavg()[0], "torch": torch.__version__}


def main() -> None:
    """Run what is asked for, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=BENCHES, action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="append to bench/results/ops.jsonl")
    arguments = parser.parse_args()
    dispatch.set_threads(arguments.threads)
    for name in arguments.only or BENCHES:
        for measured in BENCHES[name](arguments.device, torch.Generator().manual_seed(1)):
            measured |= about(arguments.device)
            print("{op:10s} {shape:48s} {msamples_per_s:9.0f} M/s  {times_reference:6.0f}x reference  error {error:.1e}".format(**measured))
            if arguments.write:
                results = Path(__file__).parent / "results" / "ops.jsonl"
                results.parent.mkdir(exist_ok=True)
                with results.open("a") as file:
                    file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
