"""Warped sums on a GPU: one program a square of the output, all frames in turn, each sum kept in registers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frazil.ops.warp import TILE

MOST_SUMS = 8  # held in registers by one program; more go in several launches


@triton.jit
def _weight(t, tap: tl.constexpr):
    """Cubic B-spline weight of neighbour tap − 1 of a position with fraction t."""
    u = 1 - t
    if tap == 0:
        return u * u * u / 6
    if tap == 1:
        return (4 - 6 * t * t + 3 * t * t * t) / 6
    if tap == 2:
        return (4 - 6 * u * u + 3 * u * u * u) / 6
    return t * t * t / 6


@triton.jit
def _warp(
    sums_ptr, frames_ptr, gain_ptr, shifts_ptr, weights_ptr, n, stride_w, height, width, columns, plane,
    sums: tl.constexpr, wide: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    ty, tx = tl.program_id(0), tl.program_id(1)
    line = tl.arange(0, tile)
    y, x = (ty * tile + line)[:, None], (tx * tile + line)[None, :]
    k = tl.arange(0, wide)
    held = k < sums
    total = tl.zeros((wide, tile, tile), tl.float32)
    tiles = tl.num_programs(0) * columns
    for f in range(n):
        at = shifts_ptr + 2 * (f * tiles + ty * columns + tx)
        dx, dy = -tl.load(at), -tl.load(at + 1)
        wx, wy = tl.floor(dx), tl.floor(dy)
        fx, fy = dx - wx, dy - wy
        ix, iy = x + wx.to(tl.int32), y + wy.to(tl.int32)
        value = tl.zeros((tile, tile), tl.float32)
        for j in tl.static_range(4):
            row = tl.minimum(tl.maximum(iy + (j - 1), 0), height - 1).to(tl.int64) * width
            part = tl.zeros((tile, tile), tl.float32)
            for i in tl.static_range(4):
                place = row + tl.minimum(tl.maximum(ix + (i - 1), 0), width - 1)
                part += _weight(fx, i) * tl.load(frames_ptr + place).to(tl.float32) * tl.load(gain_ptr + place)
            value += _weight(fy, j) * part
        w = tl.load(weights_ptr + k * stride_w + f, mask=held, other=0.0)
        total += w[:, None, None] * value[None, :, :]
        frames_ptr += plane
    inside = (y < height) & (x < width)
    place = y.to(tl.int64) * width + x
    out = sums_ptr + k.to(tl.int64)[:, None, None] * plane + place[None, :, :]
    keep = held[:, None, None] & inside[None, :, :]
    tl.store(out, tl.load(out, mask=keep, other=0.0) + total, mask=keep)


def warp_sum_(sums: Tensor, frames: Tensor, gain: Tensor, shifts: Tensor, weights: Tensor) -> None:
    """See frazil.ops.warp."""
    _, height, width = sums.shape
    n, rows, columns = shifts.shape[:3]
    if frames.dtype == torch.uint16:  # Triton loads these from the same bytes under another name
        frames = frames.float()
    for start in range(0, len(sums), MOST_SUMS):
        part = sums[start : start + MOST_SUMS]
        wide = triton.next_power_of_2(len(part))
        _warp[(rows, columns)](
            part, frames, gain, shifts, weights[start : start + MOST_SUMS].contiguous(), n, n, height, width, columns, height * width,
            sums=len(part), wide=wide, tile=TILE, num_warps=4,
        )  # fmt: skip
