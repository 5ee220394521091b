"""`accumulate` straight from its formulas, any float type. Memory: (r, p) several times."""
from __future__ import annotations

import torch
from torch import Tensor


def accumulate(slices: Tensor, row_slice: Tensor, row_image: Tensor, weights: Tensor, phases: Tensor, masked: Tensor, gain: Tensor,
               unmasked: Tensor, inverse: Tensor, scale_pixels: Tensor,
               slice_class: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(D, W, Σ_rows x (p,) float64, Σ_rows q (p,) float64, rows (r, 4))."""
    a = weights.to(phases.dtype) @ phases.T
    gamma = weights.sum(1, keepdim=True)
    s = slices[row_slice]
    data = torch.zeros_like(slices).index_add_(0, row_slice, a * unmasked[row_image])
    weight = torch.zeros_like(slices.real).index_add_(0, row_slice, gamma * inverse[row_image])
    x = (s.conj() * masked[row_image] * a).real
    q = gamma * (s.real.square() + s.imag.square()) * gain[row_image]
    chosen = scale_pixels[slice_class[row_slice]]
    rows = torch.stack([x.sum(1), q.sum(1), (x * chosen).sum(1), (q * chosen).sum(1)], 1)
    return data, weight, x.sum(0, dtype=torch.float64), q.sum(0, dtype=torch.float64), rows
