"""Point-group sum straight from the formula, in the precision of the volume."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.project.reference import corners


def symmetrise(data: Tensor, weight: Tensor, m: int, operators: Tensor) -> tuple[Tensor, Tensor]:
    """See frazil.ops.symmetrise; `operators` (float64, main memory) come without the identity."""
    c = torch.arange(-m, m + 1, device=data.device)
    z, y, x = torch.meshgrid(c, c, c[m:], indexing="ij")
    inside = x**2 + y**2 + z**2 <= (m - 1) ** 2  # on exact integers
    points = torch.stack([x[inside], y[inside], z[inside]], -1).to(weight.dtype)
    out, out_weight = data.clone(), weight.clone()
    for operator in operators.to(points):
        index, share, folded = corners(points @ operator.T, m)
        value = (data.reshape(-1)[index] * share).sum(-1)
        out[inside] += torch.where(folded, value.conj(), value)
        out_weight[inside] += (weight.reshape(-1)[index] * share).sum(-1)
    return out, out_weight
