"""How good a fit of Thon rings is: equiphase average, resolution, figure of merit, ice ring, picture (spec/processing 3.5, 3.7).

Where the defocus differs with direction, equal frequencies have different phases. The equiphase average therefore takes the mean over the
elements of equal phase, placed at the frequency at which the mean defocus has that phase: rings stay sharp with any astigmatism.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from frazil.data import Optics
from frazil.maths.ctf import wavelength
from frazil.maths.thon import Rings, half_phase, splines, visibility

GOOD, SURE_GOOD, LOST = 0.5, 0.66, 0.1  # correlations of the local fit (spec/processing 3.7)
RESOLVED = 3.0  # bins a ring must have
LONG = 3  # bins for which it must have been above
ICE_RING = (0.25, 0.28)  # 1/Å
SHOULDERS = ((0.222, 0.247), (0.287, 0.312))  # 1/Å, beside it
ENVELOPE = 6
FLOOR = 0.03  # of the envelope's highest value: below it the curves are not divided by it


@dataclass(frozen=True)
class Curves:
    """Curves of a fit by frequency, (r,) each."""

    k: Tensor  # 1/Å
    average: Tensor  # equiphase average of the log power, its background taken off
    model: Tensor  # the rings fitted
    ctf2: Tensor  # CTF² of the mean defocus
    correlation: Tensor  # of average and model around k
    rotational: Tensor  # rotational average of the log power, rings taken off
    resolution: float  # Å, to which the fit holds; inf: nowhere


def equivalent(terms: Tensor, theta: Tensor, optics: Optics) -> Tensor:
    """(n,) frequency in 1/Å at which the mean defocus has the phase that bins with `terms` (4, n) have at theta (4,)."""
    lam = wavelength(optics.voltage)
    bend = 0.5 * optics.cs * 1e7 * lam**2
    wanted = theta[:3] @ terms[:3] - bend * terms[3]  # Δf k² − ½ Cs λ² k⁴
    if bend <= 0:
        return (wanted / theta[0]).clamp(min=0).sqrt()
    # The smaller root while the phase still grows; beyond its turning point frequencies stay as they are.
    inside = theta[0].square() - 4 * bend * wanted
    root = (theta[0] - inside.clamp(min=0).sqrt()) / (2 * bend)
    return torch.where((inside > 0) & (2 * bend * terms[0] < theta[0]), root.clamp(min=0).sqrt(), terms[0].sqrt())


def equiphase_curves(rings: Rings, theta: Tensor) -> Curves:
    """The curves of a fit; `rings` over the whole range to be shown."""
    terms, weight = rings.terms, rings.root.square()
    chi = half_phase(terms, theta[None], rings.optics)[0]
    wave = -torch.cos(2 * chi) * visibility(terms, theta[None, :1], rings)[0]
    u = 0.5 * terms[0].log()
    shape = splines(u, float(u.min()), float(u.max()), ENVELOPE)
    # All linear parts together: what is left of the background with the rings in the model.
    columns = (shape * wave[:, None]) * rings.root[:, None]
    columns = columns - rings.basis @ (rings.basis.T @ columns)
    normal = columns.T @ columns
    normal = normal + 1e-4 * normal.diagonal().mean() * torch.eye(ENVELOPE).to(normal)
    level = shape @ torch.linalg.solve(normal, columns.T @ rings.data)
    level = level.clamp(min=FLOOR * float(level.abs().max()))
    without = rings.root * (rings.raw - level * wave)
    background = (rings.basis @ (rings.basis.T @ without)) / rings.root
    width = rings.bins.width
    first = math.floor(float(terms[0].min().sqrt()) / width)
    count = math.ceil(float(terms[0].max().sqrt()) / width) - first + 1
    k = (first + 0.5 + torch.arange(count, device=u.device, dtype=torch.float64)) * width

    def mean(values: Tensor, at: Tensor) -> Tensor:
        place = (at / width).long().clamp(first, first + count - 1) - first
        sums = torch.zeros(2, count, dtype=torch.float64, device=u.device)
        sums.index_add_(1, place, torch.stack([values * weight, weight]))
        return torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-12), math.nan)

    at = equivalent(terms, theta, rings.optics)
    average, model, own = mean(rings.raw - background, at), mean(level * wave, at), mean(terms[0].sqrt(), at)
    rotational = mean(rings.raw - level * wave, terms[0].sqrt())
    share = torch.zeros(count, dtype=torch.float64, device=u.device)
    share.index_add_(0, (at / width).long().clamp(first, first + count - 1) - first, weight)
    live = torch.isfinite(average) & torch.isfinite(own)
    one = torch.stack([k.square(), 0 * k, 0 * k, k**4])
    phase = half_phase(one, theta[None], rings.optics)[0]
    ctf2 = phase.sin().square()
    average = average - _trend(torch.where(live, average - model, 0.0), phase, share * live)
    correlation = sliding_correlation(torch.where(live, average, 0.0), -torch.cos(2 * phase), phase, share * live)
    found = fit_resolution(k[live].cpu(), correlation[live].cpu(), phase[live].cpu())
    k, average, model, ctf2, correlation, rotational = (v.cpu() for v in (k, average, model, ctf2, correlation, rotational))
    return Curves(k, average, model, ctf2, correlation, rotational, found)


def _bins_a_ring(phase: Tensor) -> Tensor:
    """(r,) bins in which CTF² goes through one ring."""
    apart = (phase[1:] - phase[:-1]).abs().clamp(min=1e-3)
    return math.pi / torch.cat([apart[:1], apart])


def _trend(left: Tensor, phase: Tensor, weight: Tensor) -> Tensor:
    """(r,) what is left between average and model, averaged over two rings: background too sharp for splines (ice), never rings."""
    here = torch.arange(len(left), device=left.device)
    reach = _bins_a_ring(phase).clamp(min=2, max=len(left) / 6).round()
    near = ((here[None] - here[:, None]).abs() <= reach[:, None]).double() * weight[None]
    return near @ left / near.sum(-1).clamp(min=1e-12)


def sliding_correlation(values: Tensor, model: Tensor, phase: Tensor, weight: Tensor) -> Tensor:
    """(r,) weighted correlation of values with the model within about one and a half rings on either side, at least r/40 bins."""
    n = len(values)
    passed = (phase / (0.5 * math.pi)).abs()  # extrema before
    wide = (0.5 + 0.05 * passed.clamp(max=20)) * _bins_a_ring(phase)
    reach = torch.maximum(torch.full_like(phase, n / 40), wide).clamp(max=n / 4).round()
    here = torch.arange(n, device=values.device)
    near = ((here[None] - here[:, None]).abs() <= reach[:, None]).double() * weight[None]
    total = near.sum(-1).clamp(min=1e-12)

    def centred(x: Tensor, y: Tensor) -> Tensor:
        return near @ (x * y) / total - (near @ x / total) * (near @ y / total)

    spread = (centred(values, values).clamp(min=0) * centred(model, model).clamp(min=0)).sqrt()
    return torch.where(spread > 1e-12, centred(values, model) / spread.clamp(min=1e-12), 0.0)


def fit_resolution(k: Tensor, correlation: Tensor, phase: Tensor) -> float:
    """Å to which the rings are fitted, inf if nowhere: the first fall below 0.1 after having been above, or below 0.5 after 0.66.

    It also ends where a ring has less than RESOLVED bins: what is finer is smeared or aliased.
    """
    above, sure, last = 0, 0, math.inf
    apart = torch.cat([phase[1:] - phase[:-1], phase[-1:] - phase[-2:-1]]).abs()
    resolved = (math.pi / apart.clamp(min=1e-6) >= RESOLVED).tolist()
    for i, (at, value) in enumerate(zip(k.tolist(), correlation.tolist(), strict=True)):
        if i > 0.1 * len(k) and ((value < LOST and above > LONG) or (value < GOOD and sure > LONG) or not resolved[i]):
            return last
        above, sure = above + (value > LOST), sure + (value > SURE_GOOD)
        if sure > LONG:
            last = 1 / at
    return last


def ice_ring(curves: Curves) -> tuple[float, float]:
    """(density, mean excess) of the ice ring over a line through its shoulders: sum over bins and mean of the log power.

    Both are 0 where the spectrum does not reach that far.
    """
    k, y = curves.k, curves.rotational
    live = torch.isfinite(y)
    ring = live & (k >= ICE_RING[0]) & (k <= ICE_RING[1])
    sides = [live & (k >= low) & (k <= high) for low, high in SHOULDERS]
    if not bool(ring.any()) or min(int(side.sum()) for side in sides) < 4:
        return 0.0, 0.0
    (x0, y0), (x1, y1) = ((float(k[s].mean()), float(y[s].median())) for s in sides)
    excess = y[ring] - (y0 + (y1 - y0) * (k[ring] - x0) / (x1 - x0))
    return float(excess.sum()) * 0.5, float(excess.mean())  # of amplitudes: half of the power's


def figure_of_merit(picture: Tensor, pixel_size: float, optics: Optics, theta: Tensor, limits: tuple[float, float]) -> tuple[Tensor, float]:
    """((b, b) float32 picture: left the spectrum, right the model; correlation of |CTF| with the amplitudes between `limits` in Å).

    The background taken off the amplitudes is a running mean wider than the rings (spec/processing 3.4).
    """
    b = picture.shape[0]
    line = (torch.arange(b, device=picture.device) - b // 2).double() / (b * pixel_size)
    y, x = torch.broadcast_tensors(line[:, None], line[None, :])
    k2 = x.square() + y.square()
    terms = torch.stack([k2, x.square() - y.square(), 2 * x * y, k2.square()]).flatten(1)
    model = half_phase(terms, theta[None].to(picture.device), optics)[0].sin().abs().reshape(b, b).float()
    wide = max(3, round(b * pixel_size / limits[0] * math.sqrt(2)) // 2 * 2 + 1)
    left = _flattened(picture, wide)
    k = k2.sqrt()
    cross = (x.abs() * b * pixel_size > 10) & (y.abs() * b * pixel_size > 10)
    use = (k >= 1 / limits[0]) & (k <= 1 / limits[1]) & cross & (x > 0)
    a, m = left[use].double(), model[use].double()
    a, m = a - a.mean(), m - m.mean()
    fom = float((a * m).sum() / (a.norm() * m.norm()).clamp(min=1e-12))
    seen = (k >= 1 / limits[0]) & (k <= 0.98 * float(line.abs().max()))
    spread = left[seen].std().clamp(min=1e-12)
    shown = (left / spread).clamp(-2, 3) / 5 + 0.4
    return torch.where(x <= 0, shown, model).float().cpu(), fom


def _flattened(picture: Tensor, wide: int) -> Tensor:
    """(b, b) picture less its running mean over wide × wide px, in units of a running spread."""
    left = picture - _running_mean(picture, wide)
    return left / _running_mean(left.square(), wide).clamp(min=1e-20).sqrt()


def _running_mean(picture: Tensor, wide: int) -> Tensor:
    """(b, b) mean over the wide × wide px around each, mirrored at the edges."""
    sums = pad(picture.double()[None, None], (wide // 2,) * 4, mode="reflect")[0, 0]
    for axis in (0, 1):
        total = torch.cat([torch.zeros_like(sums.narrow(axis, 0, 1)), sums.cumsum(axis)], axis)
        n = total.shape[axis] - wide
        sums = total.narrow(axis, wide, n) - total.narrow(axis, 0, n)
    return (sums / wide**2).float()
