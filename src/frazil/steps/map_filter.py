"""Filters of a whole map, and bringing one map to the scale of another.

    high-pass to d Å:  1 − low-pass;   band-pass: both;   B-factor: exp(−B k²/4), k in 1/Å, nothing beyond Nyquist
    scale of b to a:   s = Σ m a b / Σ m b²  (mask m);   by shells:  s(r) = sqrt(Σ|A|²/Σ|B|²)
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.maths.filters import apply_to_ft, lowpass_weights, power_spectrum
from frazil.maths.fourier import shell_round


def highpass_map(data: Tensor, pixel_size: float, resolution: float, edge: float = 2.0) -> Tensor:
    """Map (N, N, N) without what is coarser than `resolution` Å; raised cosine of `edge` shells around it."""
    return apply_to_ft(data, lambda r: 1 - lowpass_weights(r, data.shape[-1], pixel_size, resolution, edge))


def bandpass_map(data: Tensor, pixel_size: float, coarsest: float, finest: float, edge: float = 2.0) -> Tensor:
    """Map (N, N, N) with what lies between two resolutions in Å, raised cosines of `edge` shells around both."""
    box = data.shape[-1]

    def weight(r: Tensor) -> Tensor:
        return lowpass_weights(r, box, pixel_size, finest, edge) * (1 - lowpass_weights(r, box, pixel_size, coarsest, edge))

    return apply_to_ft(data, weight)


def b_factor_map(data: Tensor, pixel_size: float, b_factor: float) -> Tensor:
    """Map (N, N, N) damped by exp(−B k²/4), or sharpened by a negative B (Å²); the corners beyond Nyquist become 0."""
    box = data.shape[-1]
    return apply_to_ft(data, lambda r: torch.exp(-b_factor * (r / (box * pixel_size)).square() / 4) * (r <= box / 2))


def fitted_scale(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """s that makes Σ m (a − s b)² least; 0 if b is 0 there."""
    weight = torch.ones_like(a) if mask is None else mask
    below = (weight * b.square()).double().sum()
    return float((weight * a * b).double().sum() / below) if below > 0 else 0.0


def matched_by_shell(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Map b (N, N, N) scaled in every shell to the power of a, inside a mask where one is given; corners as the last shell."""
    wanted, own = (power_spectrum(v if mask is None else v * mask) for v in (a, b))
    ratio = torch.where(own > 0, (wanted / own.clamp(min=1e-300)).sqrt(), torch.zeros_like(own))
    return apply_to_ft(b, lambda r: ratio[shell_round(r).long().clamp(max=len(ratio) - 1)])
