"""Are two half maps independent? What their Fourier shells and their solvent tell.

    shells of two halves of one data set: powers alike, FSC → 0 where there is only noise, noise outside the particle uncorrelated
    a half and the mean of both:  where there is only noise, FSC = √½ and the powers are 2 : 1
    a filtered map:               its power falls off where that of an unfiltered half goes on
    joined at low resolution:     the first shells are the same in both, the next ones are not
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.filters import apply_spectrum, shell_totals
from frazil.maths.masks import radii

OUTER = 0.15  # share of the shells, those at Nyquist, in which a map should hold noise only
SAME = 1e-6  # difference of two maps, relative to their own size, that is rounding
JOINED = 1e-4  # 1 − FSC below which shells count as shared, if the next one is ten times as far from 1
SHARED_NOISE = 0.1  # correlation of the noise from which on it is shared


@dataclass(frozen=True)
class Shells:
    """What the Fourier shells of two maps A, B hold, (N/2+1,) float64 each."""

    first: Tensor  # Σ|A|²
    second: Tensor  # Σ|B|²
    fsc: Tensor


def compare_shells(a: Tensor, b: Tensor) -> Shells:
    """Powers and FSC of two maps (N, N, N) by shell."""
    x, y = torch.fft.rfftn(a), torch.fft.rfftn(b)

    def products(s: slice) -> tuple[Tensor, ...]:
        p, q = x[s], y[s]
        return p.real * q.real + p.imag * q.imag, p.real.square() + p.imag.square(), q.real.square() + q.imag.square()

    cross, first, second = shell_totals(products, a.shape[-1], 3, a.device)
    return Shells(first, second, cross / (first * second).sqrt().clamp(min=1e-300))


def outer_shells(shells: int) -> slice:
    """The shells near Nyquist."""
    return slice(shells - max(3, round(OUTER * shells)), shells)


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two maps (N, N, N) are the same but for rounding."""
    limit = SAME * max(abs(float(end)) for x in (a, b) for end in torch.aminmax(x))
    return all(bool((p - q).abs().max() <= limit) for p, q in zip(a, b, strict=True))  # mostly the first plane tells


def not_two_halves(shells: Shells) -> str | None:
    """Why two maps cannot be the unfiltered halves of one data set, judged by their shells; None if they can.

    Found are a half beside the mean of both halves, and an unfiltered map beside a filtered one.
    """
    outer, inner = outer_shells(len(shells.fsc)), slice(1, max(2, len(shells.fsc) // 8))
    scale = float(shells.second[inner].sum() / shells.first[inner].sum().clamp(min=1e-300))  # the maps may be scaled differently
    ratio = float(shells.second[outer].sum() / shells.first[outer].sum().clamp(min=1e-300)) / max(scale, 1e-300)
    agreement = float(shells.fsc[outer].mean())
    if abs(agreement - 0.5**0.5) < 0.08 and (0.4 < ratio < 0.65 or 1.55 < ratio < 2.5):
        return "one of them is the mean of both halves (its noise is half as strong and correlates by 0.7 with the other's)"
    if ratio < 0.02 or ratio > 50:
        return f"the {'second' if ratio < 1 else 'first'} is filtered (almost nothing is left of it near Nyquist), the other is not"
    return None


def shared_shells(curve: Tensor) -> int:
    """Last shell of those at the start of an FSC curve (n,) that are practically the same in both maps, 0 if there is no such step."""
    apart = 1 - curve[1:]
    different = (apart > JOINED).nonzero()
    if not len(different):
        return len(apart)
    last = int(different[0])  # apart[last] is shell last + 1
    return last if last and float(apart[last]) > 10 * max(float(apart[:last].max()), 1e-9) else 0


def solvent_correlation(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """(correlation of two maps (N, N, N) in the solvent, its standard error), of the shells near Nyquist alone; (0, 1) without solvent.

    The solvent is what lies outside the mask, or without one outside a sphere of 0.45 of the box. The maps are filtered before the
    solvent is cut out, so that nothing of the particle's low frequencies leaks through the edge of the cut.
    """
    box = a.shape[-1]
    if mask is None:
        mask = (radii(box, 3, a.device) < 0.45 * box).float()
    empty = (1 - mask).clamp(min=0)
    share = float(empty.square().mean())
    if share < 0.05:
        return 0.0, 1.0
    shells = torch.arange(box // 2 + 1, dtype=torch.float64)
    kept = torch.zeros_like(shells)
    kept[outer_shells(len(shells))] = 1.0
    x, y = (apply_spectrum(half, kept) * empty for half in (a, b))
    norm = float((x.square().sum(dtype=torch.float64) * y.square().sum(dtype=torch.float64)).sqrt())
    components = 2 * torch.pi * float((kept * shells.square()).sum()) * share  # independent complex ones
    return float((x * y).sum(dtype=torch.float64)) / norm if norm > 0 else 0.0, max(components, 1.0) ** -0.5
