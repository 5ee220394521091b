"""Pixels of micrographs as picking wants them: mean 0, standard deviation 1, no dust; where nothing was recorded (spec/processing 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 8.0  # standard deviations beyond which a pixel is dust and becomes 0
REPEATED = 0.2  # of the usual change from line to line: below, a line is a copy


def as_float(micrograph: Tensor) -> Tensor:
    """float32 of pixels of any type; unsigned 16-bit ones by way of signed ones, which every device converts."""
    if micrograph.dtype == torch.uint16:
        return micrograph.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).float()
    return micrograph.float()


def normalised(micrograph: Tensor, invert: bool) -> Tensor:
    """(y, x) float32, a new tensor: mean 0, standard deviation 1, contrast inverted where asked; dust and what is not finite is 0."""
    x = as_float(micrograph) if micrograph.dtype != torch.float32 else micrograph.clone()
    deviation, mean = torch.std_mean(x)
    if not bool(torch.isfinite(deviation)):
        x = torch.where(torch.isfinite(x), x, x[torch.isfinite(x)].mean())
        deviation, mean = torch.std_mean(x)
    x.sub_(mean).mul_((-1.0 if invert else 1.0) / deviation.clamp(min=1e-30))
    return torch.where(x.abs() <= CLIP, x, torch.zeros((), device=x.device))


def blank_border(micrograph: Tensor) -> tuple[float, float, float, float]:
    """Rows at the top and bottom, columns at the left and right that repeat their neighbours (motion correction fills up so); 0 where none.

    A line is a copy if its mean difference to the next is below a fifth of the usual one. A quarter of a side is looked at.
    """
    widths = []
    x = as_float(micrograph)
    for change in ((x[1:] - x[:-1]).abs().mean(1), (x[:, 1:] - x[:, :-1]).abs().mean(0)):
        copies = change < REPEATED * change.median()
        number = torch.arange(1, len(change) // 4 + 1, device=x.device)
        ends = torch.stack([copies, copies.flip(0)])[:, : len(number)]
        widths.append(torch.where(ends.sum(1) >= 3, (ends * number).amax(1) + 2, 0))
    top, bottom, left, right = torch.cat(widths).double().tolist()
    return top, bottom, left, right
