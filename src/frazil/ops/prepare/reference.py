"""Normalise, move and mask straight from the formulas; on a CPU, where the transforms after it take longer, also what runs."""
from __future__ import annotations

import torch
from torch import Tensor


def move(images: Tensor, shift: Tensor) -> Tensor:
    """(b, N, N) images moved by whole pixels (b, 2) xy, zeros where nothing comes in (spec 1.4)."""
    n = images.shape[-1]
    line = torch.arange(n, device=images.device)
    x, y = (line - shift[:, i, None] for i in (0, 1))
    ok = ((y >= 0) & (y < n))[:, :, None] & ((x >= 0) & (x < n))[:, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return torch.where(ok, images[batch, y.clamp(0, n - 1)[:, :, None], x.clamp(0, n - 1)[:, None, :]], 0)


def prepare(images: Tensor, shift: Tensor, factor: Tensor, circle: Tensor) -> tuple[Tensor, Tensor]:
    """See frazil.ops.prepare."""
    plain = move(images, shift).to(factor.dtype) * factor[:, None, None]
    outside = 1 - circle
    fill = plain.flatten(1) @ outside.reshape(-1) / outside.sum().clamp(min=torch.finfo(circle.dtype).tiny)
    return plain, torch.lerp(fill[:, None, None], plain, circle)
