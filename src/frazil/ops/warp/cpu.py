"""Warped sums on the CPU: threads own rows of squares; of a square all frames are added before the next one is begun."""
from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange
from torch import Tensor

from frazil.ops.dispatch import numba_threads
from frazil.ops.warp import TILE

HALO = TILE + 3


@njit(cache=True, fastmath=True)
def _square(frame, gain, block, narrow, out, top, left, fx, fy):
    """out (TILE, TILE): cubic B-spline of frame · gain with its first neighbour at (top, left), fractions fx, fy."""
    height, width = frame.shape
    if top >= 0 and left >= 0 and top + HALO <= height and left + HALO <= width:
        for j in range(HALO):
            for i in range(HALO):
                block[j, i] = np.float32(frame[top + j, left + i]) * gain[top + j, left + i]
    else:
        for j in range(HALO):
            y = min(max(top + j, 0), height - 1)
            for i in range(HALO):
                x = min(max(left + i, 0), width - 1)
                block[j, i] = np.float32(frame[y, x]) * gain[y, x]
    sixth = np.float32(1 / 6)
    one, three, four, six = np.float32(1), np.float32(3), np.float32(4), np.float32(6)
    ux, uy = one - fx, one - fy
    a0, a1 = ux * ux * ux * sixth, (four - six * fx * fx + three * fx * fx * fx) * sixth
    a2, a3 = (four - six * ux * ux + three * ux * ux * ux) * sixth, fx * fx * fx * sixth
    b0, b1 = uy * uy * uy * sixth, (four - six * fy * fy + three * fy * fy * fy) * sixth
    b2, b3 = (four - six * uy * uy + three * uy * uy * uy) * sixth, fy * fy * fy * sixth
    for j in range(HALO):
        for i in range(TILE):
            narrow[j, i] = a0 * block[j, i] + a1 * block[j, i + 1] + a2 * block[j, i + 2] + a3 * block[j, i + 3]
    for j in range(TILE):
        for i in range(TILE):
            out[j, i] = b0 * narrow[j, i] + b1 * narrow[j + 1, i] + b2 * narrow[j + 2, i] + b3 * narrow[j + 3, i]


@njit(cache=True, fastmath=True, parallel=True)
def _warp(sums, frames, gain, shifts, weights):
    n = frames.shape[0]
    r, height, width = sums.shape
    for ty in prange(shifts.shape[1]):
        block = np.empty((HALO, HALO), np.float32)
        narrow = np.empty((HALO, TILE), np.float32)
        out = np.empty((TILE, TILE), np.float32)
        total = np.empty((r, TILE, TILE), np.float32)
        rows = min(TILE, height - ty * TILE)
        for tx in range(shifts.shape[2]):
            columns = min(TILE, width - tx * TILE)
            total[:] = 0
            for f in range(n):
                dx, dy = -shifts[f, ty, tx, 0], -shifts[f, ty, tx, 1]
                wx, wy = np.floor(dx), np.floor(dy)
                _square(frames[f], gain, block, narrow, out, ty * TILE + int(wy) - 1, tx * TILE + int(wx) - 1, dx - wx, dy - wy)
                for k in range(r):
                    w = weights[k, f]
                    for j in range(TILE):
                        for i in range(TILE):
                            total[k, j, i] += w * out[j, i]
            for k in range(r):
                for j in range(rows):
                    for i in range(columns):
                        sums[k, ty * TILE + j, tx * TILE + i] += total[k, j, i]


def warp_sum_(sums: Tensor, frames: Tensor, gain: Tensor, shifts: Tensor, weights: Tensor) -> None:
    """See frazil.ops.warp."""
    numba_threads(numba)
    _warp(*(t.numpy() for t in (sums, frames, gain, shifts, weights)))
