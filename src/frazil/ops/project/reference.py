"""Slices straight from the formula, in the precision of the volume. The definition the other two are held against."""
from __future__ import annotations

import torch
from torch import Tensor


def corners(points: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trilinear stencil of (…, 3) xyz points in a half volume: flat indices (…, 8), weights (…, 8), folded (…) bool.

    A folded point had x < 0 and was negated: what is read there is to be conjugated, as is what is put there.
    """
    folded = points[..., 0] < 0
    points = torch.where(folded[..., None], -points, points)
    low = torch.floor(points)
    up = points - low
    x, y, z = low.long().unbind(-1)
    offsets = torch.tensor([[dx, dy, dz] for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)], device=points.device)
    index = ((z[..., None] + m + offsets[:, 2]) * (2 * m + 1) + y[..., None] + m + offsets[:, 1]) * (m + 1) + x[..., None] + offsets[:, 0]
    weight = torch.where(offsets == 1, up[..., None, :], 1 - up[..., None, :]).prod(-1)
    return index, weight, folded


def slice_points(rotations: Tensor, coords: Tensor, pad: float, dtype: torch.dtype) -> Tensor:
    """(n, p, 3) xyz positions P · Rᵀ · (kx, ky, 0) in the half volume."""
    return pad * torch.einsum("pa,nax->npx", coords.to(dtype), rotations[:, :2].to(dtype))


def project(volume: Tensor, m: int, rotations: Tensor, coords: Tensor, pad: float, out: Tensor) -> None:
    """See frazil.ops.project."""
    real = volume.real.dtype
    for i, points in enumerate(slice_points(rotations, coords, pad, real)):
        index, weight, folded = corners(points, m)
        inside = (index >= 0).all(-1) & (points.abs().amax(-1) < m)  # only a GPU caller can get here with any outside
        value = (volume.reshape(-1)[torch.where(inside[..., None], index, 0)] * weight).sum(-1) * inside
        out[i] = torch.where(folded, value.conj(), value)
