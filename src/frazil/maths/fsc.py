"""Fourier shell correlation of two maps, and what is read off it (spec/refinement 3.7, 4.8; spec/processing 7.2, 7.3).

    FSC(r) = Re Σ A conj(B) / sqrt(Σ|A|² Σ|B|²)     over the elements of the whole transform with round(|k|) = r;  FSC(0) = 1
    corrected (Chen et al. 2013):  (FSC_masked − FSC_random)/(1 − FSC_random) from two shells past the first randomised one
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.filters import planes, shell_totals

NO_RESOLUTION = 999.0  # Å, where not even shell 1 is above the threshold, as in RELION's files
RANDOMISE_BELOW = 0.8  # phases are randomised from the first shell whose unmasked FSC is lower


def _correlation(cross: Tensor, power1: Tensor, power2: Tensor) -> Tensor:
    """(n,) float64 normalised correlation, 0 where a shell is empty, 1 at shell 0."""
    norm = (power1 * power2).sqrt()
    curve = torch.where(norm > 0, cross / norm.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(cross))
    curve[0] = 1.0
    return curve


def fsc_of_transforms(a: Tensor, b: Tensor, box: int, *, relion: bool = False) -> Tensor:
    """(N//2+1,) float64 FSC of two half transforms (…, N//2+1) of maps (3 axes) or images (2 axes: a ring correlation).

    relion: the plane kx = 0 counts twice, as in RELION's programs (filters.shell_totals); at 64 px the two differ by up to 0.01.
    """

    def products(s: slice) -> tuple[Tensor, ...]:
        x, y = a[s], b[s]
        cross = x.real * y.real + x.imag * y.imag
        return cross, x.real.square() + x.imag.square(), y.real.square() + y.imag.square()

    return _correlation(*shell_totals(products, box, a.ndim, a.device, relion=relion))


def fsc(a: Tensor, b: Tensor, *, relion: bool = False) -> Tensor:
    """(N/2+1,) float64 Fourier shell correlation of two maps (N, N, N), on their device; ValueError if the boxes differ."""
    if a.shape != b.shape:
        raise ValueError(f"maps of different size have no FSC: {tuple(a.shape)} and {tuple(b.shape)}")
    return fsc_of_transforms(torch.fft.rfftn(a), torch.fft.rfftn(b), a.shape[-1], relion=relion)


def first_below(curve: Tensor, threshold: float) -> int | None:
    """First shell ≥ 1 of curve (n,) below the threshold, None if there is none."""
    below = (curve[1:] < threshold).nonzero()
    return int(below[0]) + 1 if len(below) else None


def resolution_at(curve: Tensor, threshold: float, box: int, pixel_size: float) -> float:
    """Å of the last shell before the curve (N/2+1,) first drops below the threshold; 999 if shell 1 already is below."""
    first = first_below(curve, threshold)
    last = len(curve) - 1 if first is None else first - 1
    return box * pixel_size / last if last > 0 else NO_RESOLUTION


def randomise_phases(volume: Tensor, from_shell: int, generator: torch.Generator, *, relion: bool = False) -> Tensor:
    """Map (N, N, N) with the same amplitudes and, from shell `from_shell` on, random phases: those of a real white-noise volume.

    relion: from |k| = from_shell on instead, as RELION does, which leaves the inner half of that shell as it is.
    The noise is drawn on the generator's device, so a CPU generator gives the same map on every device.
    """
    return _random_map(torch.fft.rfftn(volume), volume, from_shell, generator, relion=relion)


def _random_map(ft: Tensor, like: Tensor, from_shell: int, generator: torch.Generator, *, relion: bool) -> Tensor:
    """randomise_phases of the map whose half transform is ft; `like` (N, N, N) has its shape, type and device."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
    random = torch.fft.rfftn(noise)
    del noise
    start = from_shell if relion else from_shell - 0.5
    for rows, radius in planes(like.shape[-1], 3, like.device):
        here, there = ft[rows], random[rows]
        power, drawn = (x.real.square() + x.imag.square() for x in (here, there))
        ratio = (power / drawn.clamp(min=torch.finfo(like.dtype).tiny)).sqrt()
        random[rows] = torch.where(radius >= start, there * ratio, here)
    return torch.fft.irfftn(random, s=like.shape)


@dataclass(frozen=True)
class CorrectedFsc:
    """FSC curves (N/2+1,) float64 of two half maps before and after correction for the mask."""

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor  # of the masked maps with random phases; zeros where nothing was randomised
    corrected: Tensor
    randomise_from: int | None  # first randomised shell; None: the unmasked FSC never falls below 0.8, nothing could be corrected


def corrected_fsc(
    half1: Tensor, half2: Tensor, mask: Tensor, seed: int = 0, *, randomise_from: int | None = None, below: float = RANDOMISE_BELOW,
    relion: bool = False, draws: int = 1,
) -> CorrectedFsc:  # fmt: skip
    """FSC of two half maps (N, N, N) inside a mask (N, N, N), corrected for the correlation that the mask itself makes.

    The halves' phases come from different random streams: with one stream noise would correlate and the correction be too strong.
    randomise_from: the first randomised shell, instead of the first whose unmasked FSC is below `below`. relion: RELION's sums over
    shells (fsc_of_transforms) and start of the random phases. draws: mean over so many sets of random phases; a single one is noisy
    in a small box.
    """
    masked = fsc(half1 * mask, half2 * mask, relion=relion)
    transforms = torch.fft.rfftn(half1), torch.fft.rfftn(half2)
    unmasked = fsc_of_transforms(*transforms, half1.shape[-1], relion=relion)
    start = first_below(unmasked, below) if randomise_from is None else randomise_from
    if start is None:
        return CorrectedFsc(unmasked, masked, torch.zeros_like(masked), masked.clone(), None)
    random = torch.zeros_like(masked)
    for draw in range(draws):
        streams = (torch.Generator().manual_seed(2 * (seed + 1_000_003 * draw) + i) for i in (0, 1))
        noisy = (_random_map(ft, mask, start, stream, relion=relion).mul_(mask) for ft, stream in zip(transforms, streams, strict=True))
        random += fsc(*noisy, relion=relion) / draws
    corrected = corrected_for_mask(masked, random, start)
    corrected[start + 2 :] = corrected[start + 2 :].clamp(min=0)  # a refinement has no use for negative ones
    return CorrectedFsc(unmasked, masked, random, corrected, start)


def corrected_for_mask(masked: Tensor, random: Tensor, start: int) -> Tensor:
    """(…, n) curves (FSC_m − FSC_r)/(1 − FSC_r) from shell start + 2 on, FSC_m before; 0 where FSC_r ≥ 1 (Chen et al. 2013)."""
    beyond = torch.arange(masked.shape[-1], device=masked.device) >= start + 2
    true = torch.where(random < 1, (masked - random) / (1 - random).clamp(min=1e-12), torch.zeros_like(masked))
    return torch.where(beyond, true, masked)
