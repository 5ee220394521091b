"""A map against the density of its atomic model: FSC inside a mask around the atoms, where it crosses 0.5, relative B-factor.

    FSC(r) of (m·map, m·model);   m = 1 within `radius` of an atom, then a cosine edge
    |map|/|model| ≈ s exp(−B k²/4)  fitted over the shells that agree: how much blurrier the map is than the model's B-factors say
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from frazil.maths.filters import power_spectrum
from frazil.maths.fsc import NO_RESOLUTION, fsc
from frazil.maths.masks import soft_edge
from frazil.steps.map_filter import b_factor_map

SETTLED = 20.0  # Å: coarser shells, where the solvent around the model counts, may lie below the threshold


@dataclass(frozen=True)
class ModelFit:
    """How a map compares with a model."""

    unmasked: Tensor  # (N/2+1,) float64 FSC
    masked: Tensor  # (N/2+1,) float64 FSC inside the mask
    crossing: float  # Å where the masked curve falls below 0.5, between shells; 999 if it is never above
    last_shell: float  # Å of the last shell before that
    b_factor: float  # Å², of the map relative to the model; NaN if too few shells agree
    correlation: float  # of the map with the model brought to its B-factor and scale, inside the mask


def model_mask(positions: Tensor, box: int, pixel_size: float, radius: float, edge: float) -> Tensor:
    """(N, N, N) float32: 1 within `radius` Å of an atom, 0 beyond radius + edge. positions (n, 3) xyz, Å from the first voxel."""
    empty = np.ones((box, box, box), dtype=bool)
    x, y, z = (positions / pixel_size).round().long().clamp(0, box - 1).cpu().unbind(1)
    empty[z.numpy(), y.numpy(), x.numpy()] = False
    distance = np.asarray(distance_transform_edt(empty), dtype=np.float32)
    return soft_edge(torch.from_numpy(distance), radius / pixel_size, edge / pixel_size)


def crossing(curve: Tensor, threshold: float, box: int, pixel_size: float) -> tuple[float, float]:
    """(Å where a curve (N/2+1,) falls below the threshold, linear between shells; Å of the last shell above).

    Shells coarser than SETTLED are passed over, and so are the first ones below the threshold: a model without solvent may disagree there.
    """
    above = (curve >= threshold).tolist()
    side = box * pixel_size
    start = next((i for i in range(max(1, int(side / SETTLED)), len(above)) if above[i]), None)
    if start is None:
        return NO_RESOLUTION, NO_RESOLUTION
    end = next((i for i in range(start, len(above)) if not above[i]), None)
    if end is None:
        return side / (len(above) - 1), side / (len(above) - 1)
    high, low = float(curve[end - 1]), float(curve[end])
    return side / (end - 1 + (high - threshold) / (high - low)), side / (end - 1)


def relative_b_factor(data: Tensor, model: Tensor, curve: Tensor, pixel_size: float) -> float:
    """B in Å² with |data|/|model| ∝ exp(−B k²/4), a line through ln of the ratio over k² in shells beyond 10 Å with FSC > 0.5."""
    box = data.shape[-1]
    k2 = (torch.arange(box // 2 + 1, dtype=torch.float64) / (box * pixel_size)).square()
    use = (curve.cpu() > 0.5) & (k2 > 0.01)
    use[-1] = False  # half of the last shell lies beyond Nyquist
    if int(use.sum()) < 4:
        return math.nan
    # The signal's share of the map's power is FSC² of map and model, or the noise would look like sharpness.
    ratio = (power_spectrum(data) / power_spectrum(model)).sqrt().cpu() * curve.cpu().clamp(min=1e-3)
    x, y = k2[use] - k2[use].mean(), ratio[use].log()
    return float(-4 * (x * y).sum() / x.square().sum())


def fit_to_model(data: Tensor, model: Tensor, mask: Tensor, pixel_size: float) -> ModelFit:
    """Compare a map with the density of a model, both (N, N, N) on one grid, inside a mask (N, N, N)."""
    box = data.shape[-1]
    masked = fsc(data * mask, model * mask)
    cross, last = crossing(masked, 0.5, box, pixel_size)
    b = relative_b_factor(data * mask, model * mask, masked, pixel_size)
    like = b_factor_map(model, pixel_size, 0.0 if math.isnan(b) else b)
    same = b_factor_map(data, pixel_size, 0.0)  # without the corners beyond Nyquist, as the other
    inside = mask > 0.5
    u, v = same[inside].double(), like[inside].double()
    u, v = u - u.mean(), v - v.mean()
    correlation = float((u @ v) / (u.norm() * v.norm()).clamp(min=1e-30))
    return ModelFit(fsc(data, model), masked, cross, last, b, correlation)
