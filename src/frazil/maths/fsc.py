"""Fourier shell correlation of two maps, and what is read off it (spec/refinement 3.7, 4.8; spec/processing 7.2, 7.3).

    FSC(r) = Re Σ A conj(B) / sqrt(Σ|A|² Σ|B|²)     over the elements of the whole transform with round(|k|) = r;  FSC(0) = 1
    corrected (Chen et al. 2013):  (FSC_masked − FSC_random)/(1 − FSC_random) from two shells past the first randomised one
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.filters import planes, shell_sums
from frazil.maths.fourier import shell_round

NO_RESOLUTION = 999.0  # Å, where not even shell 1 is above the threshold, as in RELION's files
RANDOMISE_BELOW = 0.8  # phases are randomised from the first shell whose unmasked FSC is lower


def _correlation(cross: Tensor, power1: Tensor, power2: Tensor) -> Tensor:
    """(n,) float64 normalised correlation, 0 where a shell is empty, 1 at shell 0."""
    norm = (power1 * power2).sqrt()
    curve = torch.where(norm > 0, cross / norm.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(cross))
    curve[0] = 1.0
    return curve


def fsc_of_transforms(a: Tensor, b: Tensor, box: int) -> Tensor:
    """(N//2+1,) float64 FSC of two half transforms (…, N//2+1) of maps (3 axes) or images (2 axes: a ring correlation)."""
    dims, device = a.ndim, a.device
    cross = shell_sums(lambda s: a[s].real * b[s].real + a[s].imag * b[s].imag, box, dims, device)
    power = [shell_sums(lambda s, x=x: x[s].real.square() + x[s].imag.square(), box, dims, device) for x in (a, b)]
    return _correlation(cross, *power)


def fsc(a: Tensor, b: Tensor) -> Tensor:
    """(N/2+1,) float64 Fourier shell correlation of two maps (N, N, N), on their device; ValueError if the boxes differ."""
    if a.shape != b.shape:
        raise ValueError(f"maps of different size have no FSC: {tuple(a.shape)} and {tuple(b.shape)}")
    return fsc_of_transforms(torch.fft.rfftn(a), torch.fft.rfftn(b), a.shape[-1])


def first_below(curve: Tensor, threshold: float) -> int | None:
    """First shell ≥ 1 of curve (n,) below the threshold, None if there is none."""
    below = (curve[1:] < threshold).nonzero()
    return int(below[0]) + 1 if len(below) else None


def resolution_at(curve: Tensor, threshold: float, box: int, pixel_size: float) -> float:
    """Å of the last shell before the curve (N/2+1,) first drops below the threshold; 999 if shell 1 already is below."""
    first = first_below(curve, threshold)
    last = len(curve) - 1 if first is None else first - 1
    return box * pixel_size / last if last > 0 else NO_RESOLUTION


def randomise_phases(volume: Tensor, from_shell: int, generator: torch.Generator) -> Tensor:
    """Map (N, N, N) with the same amplitudes and, from shell `from_shell` on, random phases: those of a real white-noise volume.

    The noise is drawn on the generator's device, so a CPU generator gives the same map on every device.
    """
    noise = torch.randn(volume.shape, generator=generator, device=generator.device, dtype=volume.dtype).to(volume.device)
    ft, random = torch.fft.rfftn(volume), torch.fft.rfftn(noise)
    for rows, radius in planes(volume.shape[-1], 3, volume.device):
        phase = random[rows] / random[rows].abs().clamp(min=torch.finfo(volume.dtype).tiny)
        ft[rows] = torch.where(shell_round(radius) >= from_shell, ft[rows].abs() * phase, ft[rows])
    return torch.fft.irfftn(ft, s=volume.shape)


@dataclass(frozen=True)
class CorrectedFsc:
    """FSC curves (N/2+1,) float64 of two half maps before and after correction for the mask."""

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor  # of the masked maps with random phases; zeros where nothing was randomised
    corrected: Tensor
    randomise_from: int | None  # first randomised shell; None: the unmasked FSC never falls below 0.8, nothing could be corrected


def corrected_fsc(half1: Tensor, half2: Tensor, mask: Tensor, seed: int = 0, *, randomise_from: int | None = None) -> CorrectedFsc:
    """FSC of two half maps (N, N, N) inside a mask (N, N, N), corrected for the correlation that the mask itself makes.

    The halves' phases come from different random streams: with one stream noise would correlate and the correction be too strong.
    randomise_from: the first randomised shell, instead of the first whose unmasked FSC is below 0.8.
    """
    unmasked = fsc(half1, half2)
    masked = fsc(half1 * mask, half2 * mask)
    start = first_below(unmasked, RANDOMISE_BELOW) if randomise_from is None else randomise_from
    if start is None:
        return CorrectedFsc(unmasked, masked, torch.zeros_like(masked), masked.clone(), None)
    noisy = [randomise_phases(half, start, torch.Generator().manual_seed(2 * seed + i)) * mask for i, half in enumerate((half1, half2))]
    random = fsc(*noisy)
    corrected = masked.clone()
    beyond = torch.arange(len(masked), device=masked.device) >= start + 2
    excess = masked - random
    real = (excess > 0) & (random < 1)
    corrected[beyond] = torch.where(real, excess / (1 - random).clamp(min=1e-12), torch.zeros_like(excess))[beyond]
    return CorrectedFsc(unmasked, masked, random, corrected, start)
