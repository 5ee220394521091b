"""Cutting and levelling straight from the formulas; also what runs on a GPU."""
from __future__ import annotations

import torch
from torch import Tensor


def cut(micrograph: Tensor, corner: Tensor, box: int) -> Tensor:
    """See frazil.ops.boxes."""
    line = torch.arange(box, device=micrograph.device)
    x, y = (corner[:, i, None] + line for i in (0, 1))
    height, width = micrograph.shape
    return micrograph[y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]


def background(box: int, radius: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(basis (3, N, N) float64 of 1, x, y with the origin at pixel N/2, mask (N, N) bool of the background)."""
    line = torch.arange(box, dtype=torch.float64, device=device) - box // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y]), x**2 + y**2 > radius**2


def normal_inverse(box: int, radius: float, terms: int) -> Tensor:
    """(terms, terms) float64 inverse of the normal equations of the plane (3 terms) or the mean (1) over the background."""
    basis, mask = background(box, radius)
    chosen = basis[:terms, mask]
    return torch.linalg.inv(chosen @ chosen.T)


def level_(images: Tensor, radius: float, factor: float, ramp: bool) -> Tensor:
    """See frazil.ops.boxes. Sums are in float64 whatever the type of the images."""
    box, terms = images.shape[-1], 3 if ramp else 1
    basis, mask = background(box, radius, images.device)
    weight, basis = mask.to(images.dtype), basis[:terms]
    count = float(mask.sum())
    pivot = ((images * weight).sum((1, 2), dtype=torch.float64) / count).to(images.dtype)  # the rest is small: float32 loses nothing
    finite = torch.isfinite(images.sum((1, 2)))
    images -= pivot[:, None, None]
    sums = torch.stack([(images * (weight * b.to(images.dtype))).sum((1, 2), dtype=torch.float64) for b in basis], -1)
    plane = sums @ normal_inverse(box, radius, terms).to(sums)
    for k, b in enumerate(basis):
        images -= plane[:, k, None, None].to(images.dtype) * b.to(images.dtype)
    sd = ((images * weight).square().sum((1, 2), dtype=torch.float64) / count).sqrt()
    images *= (factor / sd).to(images.dtype)[:, None, None]
    return torch.stack([pivot.double() + plane[:, 0], torch.where(finite, sd, torch.nan)], -1)
