"""Boxes in Numba: each is copied row by row, and levelled in two passes over pixels that are still in the cache."""
from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from frazil.ops.boxes.reference import normal_inverse
from frazil.ops.dispatch import numba_threads


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _cut(micrograph, corner, out):  # noqa: ANN001
    height, width = micrograph.shape
    n = out.shape[1]
    for i in numba.prange(len(out)):
        left, top = corner[i, 0], corner[i, 1]
        first, last = min(n, max(0, -left)), max(0, min(n, width - left))  # columns that lie inside
        for y in range(n):
            row, to = micrograph[min(height - 1, max(0, top + y))], out[i, y]
            for x in range(first):
                to[x] = row[0]
            for x in range(first, last):
                to[x] = row[left + x]
            for x in range(max(first, last), n):
                to[x] = row[width - 1]


@numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=True, error_model="numpy")
def _level(images, start, stop, inverse, factor, out):  # noqa: ANN001
    """start, stop (N,): columns of each row that are particle, not background."""
    n, half, terms = images.shape[1], images.shape[1] // 2, len(inverse)
    count = 0
    for y in range(n):
        count += n - (stop[y] - start[y])
    kind = images.dtype.type  # within a row sums are in the type of the images, across rows in float64
    line = (np.arange(n) - half).astype(images.dtype)
    for i in numba.prange(len(images)):
        image = images[i]
        pivot = image[0, 0]
        s0, sx, sy, s2 = 0.0, 0.0, 0.0, 0.0
        for y in range(n):
            r0, rx, r2 = kind(0), kind(0), kind(0)
            row = image[y]
            for x in range(start[y]):
                d = row[x] - pivot
                r0 += d
                rx += d * line[x]
                r2 += d * d
            for x in range(stop[y], n):
                d = row[x] - pivot
                r0 += d
                rx += d * line[x]
                r2 += d * d
            s0 += r0
            sx += rx
            sy += np.float64(r0) * (y - half)
            s2 += r2
        if terms == 3:
            a = inverse[0, 0] * s0 + inverse[0, 1] * sx + inverse[0, 2] * sy
            b = inverse[1, 0] * s0 + inverse[1, 1] * sx + inverse[1, 2] * sy
            c = inverse[2, 0] * s0 + inverse[2, 1] * sx + inverse[2, 2] * sy
        else:
            a, b, c = inverse[0, 0] * s0, 0.0, 0.0
        left = (s2 - a * s0 - b * sx - c * sy) / count  # variance about the plane, by the normal equations
        sd = math.sqrt(left) if left > 1e-12 * s2 / count else 0.0
        gain = kind(factor / sd) if sd > 0 else kind(0)
        slope = kind(b)
        total = 0.0
        for y in range(n):
            row, level = image[y], kind(a + c * (y - half))
            part = kind(0)
            for x in range(n):
                value = gain * (row[x] - pivot - (level + slope * line[x]))
                row[x] = value
                part += value
            total += part
        out[i, 0] = np.float64(pivot) + a
        out[i, 1] = sd if total - total == 0.0 else np.nan


def cut(micrograph: Tensor, corner: Tensor, box: int) -> Tensor:
    """See frazil.ops.boxes."""
    numba_threads(numba)
    out = torch.empty(len(corner), box, box, dtype=micrograph.dtype)
    if len(corner):
        _cut(micrograph.contiguous().numpy(), corner.contiguous().numpy(), out.numpy())
    return out


def level_(images: Tensor, radius: float, factor: float, ramp: bool) -> Tensor:
    """See frazil.ops.boxes."""
    numba_threads(numba)
    box = images.shape[-1]
    line = np.arange(box, dtype=np.float64) - box // 2
    inside = line[:, None] ** 2 + line**2 <= radius**2
    some = inside.any(1)
    start = np.where(some, inside.argmax(1), box)
    stop = np.where(some, box - inside[:, ::-1].argmax(1), box)
    out = np.empty((len(images), 2))
    if len(images):
        work = images if images.is_contiguous() else images.contiguous()
        _level(work.numpy(), start, stop, normal_inverse(box, radius, 3 if ramp else 1).numpy(), float(factor), out)
        if work is not images:
            images.copy_(work)
    return torch.from_numpy(out)
