"""Slices straight from the formula, in the precision of the volume. The definition the other two are held against."""
from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from frazil.ops.project import Geometry


def corners(points: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear stencil of (…, d) points in a half volume (d = 3, xyz) or half plane (d = 2, xy).

    Flat indices (…, 2^d), weights (…, 2^d), folded (…) bool. A folded point had x < 0 and was negated: what is read there is to
    be conjugated, as is what is put there.
    """
    folded = points[..., 0] < 0
    points = torch.where(folded[..., None], -points, points)
    low = torch.floor(points)
    up = points - low
    offsets = torch.tensor([c[::-1] for c in product((0, 1), repeat=points.shape[-1])], device=points.device)
    place = low.long()[..., None, :] + offsets
    index = torch.zeros_like(place[..., 0])
    for axis in range(points.shape[-1] - 1, 0, -1):
        index = (index + place[..., axis] + m) * (2 * m + 1 if axis > 1 else m + 1)
    index = index + place[..., 0]
    weight = torch.where(offsets == 1, up[..., None, :], 1 - up[..., None, :]).prod(-1)
    return index, weight, folded


def slice_points(rotations: Tensor, coords: Tensor, pad: float, dtype: torch.dtype, flat: bool = False) -> Tensor:
    """(n, p, 3) xyz positions P · Rᵀ · (kx, ky, 0) in the half volume; (n, p, 2) xy in a half plane."""
    used = rotations[:, :2, :2] if flat else rotations[:, :2]
    return pad * torch.einsum("pa,nax->npx", coords.to(dtype), used.to(dtype))


def project(
    volume: Tensor, geometry: Geometry, rotations: Tensor, coords: Tensor, pad: float, out: Tensor, which: Tensor | None
) -> None:
    """See frazil.ops.project."""
    real, m = volume.real.dtype, geometry.m
    of = [0] * len(rotations) if which is None else which.tolist()
    volumes = volume.reshape(-1, geometry.elements)
    for i, points in enumerate(slice_points(rotations, coords, pad, real, geometry.flat)):
        index, weight, folded = corners(points, m)
        inside = (index >= 0).all(-1) & (points.abs().amax(-1) < m)  # only a GPU caller can get here with any outside
        value = (volumes[of[i]][torch.where(inside[..., None], index, 0)] * weight).sum(-1) * inside
        out[i] = torch.where(folded, value.conj(), value)
