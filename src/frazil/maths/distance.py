"""Exact Euclidean distance transform of a box up to a reach, one axis after the other (Felzenszwalb & Huttenlocher 2012, eq. 1).

    D²(x, y, z) = min over x', y', z' of (x − x')² + (y − y')² + (z − z')² + f(x', y', z'),    f = 0 in the set, ∞ outside

The minimum over one axis at a time is the minimum over all; offsets beyond the reach cannot matter, so that an axis takes 2·reach
additions and minima of small integers, on any device. Everything is exact: D² are integers.
"""
from __future__ import annotations

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}  # elements treated at a time: a CPU core's cache holds that many 16-bit integers


def squared_distance(inside: Tensor, reach: int) -> Tensor:
    """(Z, Y, X) int16 or int32: squared distance in px to the nearest True voxel of `inside` (Z, Y, X), (reach + 1)² where farther.

    Distances up to `reach` are exact. ValueError for a negative reach.
    """
    if reach < 0:
        raise ValueError(f"reach must not be negative, got {reach}")
    far = (reach + 1) ** 2
    kind = torch.int16 if far + reach**2 < 2**15 else torch.int32
    field = torch.full(inside.shape, far, dtype=kind, device=inside.device).masked_fill_(inside, 0)
    for axis in range(3):
        field = _along(field, axis, reach)
    return field.clamp_(max=far)


def _along(field: Tensor, axis: int, reach: int) -> Tensor:
    """min over t of field at (place + t) + t² along an axis."""
    out = torch.empty_like(field)
    other = 1 if axis == 0 else 0
    plane = max(1, field.numel() // field.shape[other])
    thick = max(1, CHUNK.get(field.device.type, 1 << 18) // plane)
    for source, target in zip(field.split(thick, other), out.split(thick, other), strict=True):
        piece = source.contiguous()
        best, n = piece.clone(), piece.shape[axis]
        for t in range(1, min(reach, n - 1) + 1):
            shifted = piece + t * t
            before, after = best.narrow(axis, 0, n - t), best.narrow(axis, t, n - t)
            torch.minimum(before, shifted.narrow(axis, t, n - t), out=before)
            torch.minimum(after, shifted.narrow(axis, 0, n - t), out=after)
        target.copy_(best)
    return out


def bounding_box(inside: Tensor, margin: int = 0) -> tuple[slice, slice, slice]:
    """Slices of z, y, x that hold every True voxel of `inside` (Z, Y, X) and `margin` px around; ValueError if there is none."""
    flat = inside.view(torch.uint8).amax(dim=0)  # of bytes several times as fast as any() of bools
    lines = (torch.stack([plane.any() for plane in inside]), flat.amax(dim=1), flat.amax(dim=0))
    slices = []
    for line in lines:
        used = line.nonzero()
        if not len(used):
            raise ValueError("no voxel is inside")
        slices.append(slice(max(0, int(used[0]) - margin), min(len(line), int(used[-1]) + 1 + margin)))
    return slices[0], slices[1], slices[2]
