"""Insertion straight from the formula, in the precision of the volume."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.project.reference import corners, slice_points


def insert_(
    data: Tensor, weight: Tensor, m: int, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float
) -> None:
    """See frazil.ops.insert_."""
    flat_data, flat_weight = data.view(-1), weight.view(-1)
    for d, w, points in zip(slices, slice_weights, slice_points(rotations, coords, pad, weight.dtype), strict=True):
        index, share, folded = corners(points, m)
        inside = (index >= 0).all(-1) & (points.abs().amax(-1) < m)  # only a GPU caller can get here with any outside
        d = torch.where(folded, d.conj(), d)
        flat_data.index_add_(0, index[inside].view(-1), (share * d[:, None])[inside].view(-1).to(data.dtype))
        flat_weight.index_add_(0, index[inside].view(-1), (share * w[:, None])[inside].view(-1))
