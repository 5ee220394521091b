"""Weighted sums of displaced frames: T_r(x) += Σ_f a_rf Σ_j β³(x − d_f(x) − j) g(j) F_f(j), β³ the cubic B-spline.

d_f(x) is constant on squares of TILE px (its value in the middle of the square). Dividing the transform of T by that of the
sampled spline (`spline_transfer`) makes it cubic-spline interpolation: exact for d = 0. Beyond its edges a frame repeats its border.
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick

TILE = 16
FRAME_TYPES = (torch.uint8, torch.int16, torch.uint16, torch.float32, torch.int8)


def tile_centres(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(rows, columns): float64 y and x of the middles of the squares in px."""
    return tuple((torch.arange(-(-side // TILE), dtype=torch.float64) + 0.5) * TILE - 0.5 for side in (height, width))  # pyright: ignore[reportReturnType]


def spline_transfer(n: int, half: bool, device: torch.device | str = "cpu") -> Tensor:
    """Transform (2 + cos 2πs)/3 of the sampled cubic B-spline along an axis of n px, in FFT order, or n//2 + 1 long with `half`."""
    frequencies = torch.fft.rfftfreq if half else torch.fft.fftfreq
    s = frequencies(n, device=device, dtype=torch.float64)
    return ((2 + torch.cos(2 * torch.pi * s)) / 3).float()


def warp_sum_(sums: Tensor, frames: Tensor, gain: Tensor, shifts: Tensor, weights: Tensor, *, implementation: str | None = None) -> None:
    """Add displaced frames to `sums` (r, H, W) float32, in place.

    frames (n, H, W) uint8, int8, int16, uint16 or float32; gain (H, W) float32; shifts (n, ty, tx, 2) float32 xy in px, the
    displacement of each square of TILE px (ty = ⌈H/TILE⌉, tx = ⌈W/TILE⌉; content moves by +d); weights (r, n) float32.
    Raises ValueError on wrong shapes or types.
    """
    r, height, width = sums.shape
    n = len(frames)
    tiles = (n, -(-height // TILE), -(-width // TILE), 2)
    if frames.shape != (n, height, width) or frames.dtype not in FRAME_TYPES:
        raise ValueError(f"warp_sum_: frames must be (n, {height}, {width}) of a detector's type, got {tuple(frames.shape)} {frames.dtype}")
    wanted = (("gain", gain, (height, width)), ("shifts", shifts, tiles), ("weights", weights, (r, n)), ("sums", sums, sums.shape))
    for name, value, shape in wanted:
        if value.shape != shape or value.dtype != torch.float32 or value.device != frames.device:
            raise ValueError(f"warp_sum_: {name} must be {shape} float32 on {frames.device}, got {tuple(value.shape)} {value.dtype} on "
                f"{value.device}")
    if not sums.is_contiguous():
        raise ValueError("warp_sum_: sums is written in place and must be contiguous")
    if n == 0:
        return
    match pick(sums, implementation, op="warp"):
        case "triton":
            from .triton import warp_sum_ as run
        case "cpu":
            from .cpu import warp_sum_ as run
        case _:
            from .reference import warp_sum_ as run
    run(sums, frames.contiguous(), gain.contiguous(), shifts.contiguous(), weights.contiguous())
