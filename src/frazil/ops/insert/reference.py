"""Insertion straight from the formula, in the precision of the volume."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frazil.ops.project.reference import corners, slice_points

if TYPE_CHECKING:
    from frazil.ops.project import Geometry


def insert_(
    data: Tensor, weight: Tensor, geometry: Geometry, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    which: Tensor | None,
) -> None:  # fmt: skip
    """See frazil.ops.insert_."""
    m = geometry.m
    of = [0] * len(rotations) if which is None else which.tolist()
    volumes, weights = data.view(-1, geometry.elements), weight.view(-1, geometry.elements)
    points_of = slice_points(rotations, coords, pad, weight.dtype, geometry.flat)
    for d, w, points, k in zip(slices, slice_weights, points_of, of, strict=True):
        flat_data, flat_weight = volumes[k], weights[k]
        index, share, folded = corners(points, m)
        inside = (index >= 0).all(-1) & (points.abs().amax(-1) < m)  # only a GPU caller can get here with any outside
        d = torch.where(folded, d.conj(), d)
        flat_data.index_add_(0, index[inside].view(-1), (share * d[:, None])[inside].view(-1).to(data.dtype))
        flat_weight.index_add_(0, index[inside].view(-1), (share * w[:, None])[inside].view(-1))
