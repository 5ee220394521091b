"""Warped sums on the CPU: threads own rows of squares; of a square all frames are added before the next one is begun."""
from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange
from torch import Tensor

from frazil.ops.dispatch import numba_threads
from frazil.ops.warp import TILE

HALO = TILE + 3
LINE = 20  # px from one row of a square to the next: its loops run over rows as one line, and compilers make vectors of long lines


@njit(cache=True, fastmath=True)
def _read(frame, gain, block, top, left):
    """block (HALO·LINE): frame · gain from (top, left) on; beyond its edges a frame repeats its border."""
    height, width = frame.shape
    if top >= 0 and left >= 0 and top + HALO <= height and left + LINE <= width:
        for j in range(HALO):
            for i in range(LINE):
                block[j * LINE + i] = np.float32(frame[top + j, left + i]) * gain[top + j, left + i]
    else:
        for j in range(HALO):
            y = min(max(top + j, 0), height - 1)
            for i in range(LINE):
                x = min(max(left + i, 0), width - 1)
                block[j * LINE + i] = np.float32(frame[y, x]) * gain[y, x]


@njit(cache=True, fastmath=True)
def _interpolate(block, narrow, out, fx, fy):
    """out (TILE·LINE): cubic B-spline of a block at fractions fx, fy behind its second row and column; only TILE px of a row count."""
    sixth = np.float32(1 / 6)
    one, three, four, six = np.float32(1), np.float32(3), np.float32(4), np.float32(6)
    ux, uy = one - fx, one - fy
    a0, a1 = ux * ux * ux * sixth, (four - six * fx * fx + three * fx * fx * fx) * sixth
    a2, a3 = (four - six * ux * ux + three * ux * ux * ux) * sixth, fx * fx * fx * sixth
    b0, b1 = uy * uy * uy * sixth, (four - six * fy * fy + three * fy * fy * fy) * sixth
    b2, b3 = (four - six * uy * uy + three * uy * uy * uy) * sixth, fy * fy * fy * sixth
    for q in range(HALO * LINE - 3):
        narrow[q] = a0 * block[q] + a1 * block[q + 1] + a2 * block[q + 2] + a3 * block[q + 3]
    for q in range(TILE * LINE):
        out[q] = b0 * narrow[q] + b1 * narrow[q + LINE] + b2 * narrow[q + 2 * LINE] + b3 * narrow[q + 3 * LINE]


@njit(cache=True, fastmath=True, parallel=True, nogil=True)
def _warp(sums, frames, gain, shifts, weights):
    n = frames.shape[0]
    r, height, width = sums.shape
    for ty in prange(shifts.shape[1]):
        block = np.zeros(HALO * LINE, np.float32)
        narrow = np.zeros(HALO * LINE, np.float32)
        out = np.empty(TILE * LINE, np.float32)
        total = np.empty((r, TILE * LINE), np.float32)
        rows = min(TILE, height - ty * TILE)
        for tx in range(shifts.shape[2]):
            columns = min(TILE, width - tx * TILE)
            total[:] = 0
            for f in range(n):
                dx, dy = -shifts[f, ty, tx, 0], -shifts[f, ty, tx, 1]
                wx, wy = np.floor(dx), np.floor(dy)
                _read(frames[f], gain, block, ty * TILE + int(wy) - 1, tx * TILE + int(wx) - 1)
                _interpolate(block, narrow, out, dx - wx, dy - wy)
                for k in range(r):
                    w = weights[k, f]
                    for q in range(TILE * LINE):
                        total[k, q] += w * out[q]
            for k in range(r):
                for j in range(rows):
                    for i in range(columns):
                        sums[k, ty * TILE + j, tx * TILE + i] += total[k, j * LINE + i]


def warp_sum_(sums: Tensor, frames: Tensor, gain: Tensor, shifts: Tensor, weights: Tensor) -> None:
    """See frazil.ops.warp."""
    numba_threads(numba)
    _warp(*(t.numpy() for t in (sums, frames, gain, shifts, weights)))
