"""Half maps on disk for the tests of jobs that read them."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frazil.io.mrc import write_mrc
from frazil.maths.filters import apply_to_ft, lowpass_map
from frazil.maths.masks import soft_sphere

BOX, PIXEL = 40, 3.0


def write_halves(folder: Path, rng: torch.Generator) -> list[Tensor]:
    """half1.mrc, half2.mrc, mask.mrc, and what goes wrong with each: see the names."""
    mask = soft_sphere(BOX, 10, 5)
    signal = apply_to_ft(torch.randn(BOX, BOX, BOX, generator=rng), lambda r: 30 * torch.exp(-r / 3)) * mask + mask
    halves = [signal + torch.randn(BOX, BOX, BOX, generator=rng) for _ in range(2)]
    mean = (halves[0] + halves[1]) / 2
    nan = halves[1].clone()
    nan[3, 4, 5] = float("nan")
    small, empty = torch.randn(32, 32, 32, generator=rng), torch.zeros(BOX, BOX, BOX)
    maps = {"half1": halves[0], "half2": halves[1], "mask": mask, "mean": mean, "filtered": lowpass_map(mean, PIXEL, 10.0), "nan": nan,
            "small": small, "empty": empty, "outside": 2 * mask - 0.5}  # fmt: skip
    for name, data in maps.items():
        write_mrc(folder / f"{name}.mrc", data, PIXEL)
    write_mrc(folder / "coarse.mrc", halves[1], 3.5)
    write_mrc(folder / "coarse_mask.mrc", mask, 3.5)
    write_mrc(folder / "bare1.mrc", halves[0], 0.0)
    return halves


WRONG_HALVES = [
    ("small.mrc", [], "small.mrc: box 32 px"),
    ("coarse.mrc", [], "coarse.mrc: pixel size 3.5 Å"),
    ("half1.mrc", [], "given as both half maps"),
    ("mean.mrc", [], "mean of both halves"),
    ("filtered.mrc", [], "is filtered"),
    ("nan.mrc", [], "not finite"),
    ("empty.mrc", [], "same value"),
    ("nowhere.mrc", [], "no such file"),
    ("half2.mrc", ["--mask", "coarse_mask.mrc"], "coarse_mask.mrc: pixel size 3.5 Å"),
    ("half2.mrc", ["--mask", "small.mrc"], "small.mrc: box 32 px"),
    ("half2.mrc", ["--mask", "outside.mrc"], "expected 0 to 1"),
    ("half2.mrc", ["--mask", "empty.mrc"], "every voxel is 0"),
    ("half2.mrc", ["--mask", "nan.mrc"], "not finite"),
    ("half2.mrc", ["--mtf", "no_mtf.star"], "rlnMtfValue"),
    ("half2.mrc", ["--mtf", "mtf_falls.star"], "must rise"),
]


def write_wrong_mtfs(folder: Path) -> None:
    """STAR files that are no MTF."""
    (folder / "no_mtf.star").write_text("data_x\n\nloop_\n_rlnResolution #1\n0.1\n0.2\n")
    (folder / "mtf_falls.star").write_text("data_mtf\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n0.2 1.0\n0.1 0.5\n")
