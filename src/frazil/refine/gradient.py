"""Gradient descent on mini-batches of particles for 2D classes: VDAM (spec/refinement 5.1 to 5.3; Kimanius et al., Biochem J 2021).

A step of a class's half plane V from the sums of two pseudo-halves h of a mini-batch, G_h of residuals and W_h:

    g_h = G_h / max(1, W_h)      m_h ← μ m_h + (1 − μ) g_h      v ← ν v + (1 − ν) |g_1 − g_2|² / |½(g_1 + g_2)|²
    V ← V + η (1 − e^{−(3K+10) p}) (F ½(m_1 + m_2)/√v − (1 − F) V),     F = snr/(1 + snr),  snr(r) = 2 T mean|V| / mean|m_1 − m_2|

p is the class's share of the particles, so that a small class, whose gradient is little known, moves little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.maths.fourier2d import half_plane_radii, shell_means_of_planes
from frazil.refine.model import Model

MOMENTUM = 0.9  # μ: of the gradients, the noise and the priors
SECOND_MOMENTUM = 0.999  # ν
FIRST_STEP, LAST_STEP = 0.9, 0.3  # η at the start and at the end
INITIAL, FINAL = 0.3, 0.2  # shares of the iterations before and after the ramp
SMALL = 1e-12
BLOBS = 40  # of either sign
SIGNIFICANT = 5  # most coarse samples a particle takes to the fine pass, times the number of classes


@dataclass(frozen=True)
class Schedule:
    """How a run of gradient steps goes from coarse to fine."""

    iterations: int
    particles: int  # of the whole set

    @property
    def start(self) -> int:
        """Last iteration of the initial phase, b."""
        return round(INITIAL * self.iterations)

    @property
    def ramp(self) -> int:
        """Iterations between the initial and the final phase, c."""
        return max(1, self.iterations - self.start - round(FINAL * self.iterations))

    def between(self, iteration: int) -> bool:
        """Whether an iteration lies between the initial and the final phase."""
        return self.start <= iteration < self.start + self.ramp

    def batch(self, iteration: int) -> int:
        """Particles of the mini-batch of an iteration; the last takes all, so that every particle has a class."""
        first = max(min(round(0.005 * self.particles), 10**4), 200)
        last = max(min(round(0.05 * self.particles), 10**5), 1000)
        part = min(max((iteration - self.start) / self.ramp, 0.0), 1.0)
        return self.particles if iteration >= self.iterations else min(self.particles, round(first + part * (last - first)))

    def step(self, iteration: int) -> float:
        """η: from 0.9 down to 0.3 through half of the ramp."""
        s = self._fall(iteration, self.ramp / 2)
        return FIRST_STEP * s + LAST_STEP * (1 - s)

    def tau_fudge(self, iteration: int, last: float) -> float:
        """T: from 1 to the wanted value through a quarter of the ramp."""
        s = self._fall(iteration, self.ramp / 4)
        return s + last * (1 - s)

    def _fall(self, iteration: int, width: float) -> float:
        """From 1 to 0 around `start` + width/2."""
        return 1 / (1 + 10 ** min((iteration - self.start - width / 2) / (width / 4), 300))


@dataclass(frozen=True)
class Moments:
    """Running means of the gradients, on half planes up to Nyquist of the padded grid."""

    first: Tensor  # (2, K, 2M+1, M+1) complex, by pseudo-half
    second: Tensor  # (K, 2M+1, M+1) real
    begun: bool = False  # whether `first` holds any gradient yet


def no_moments(classes: int, m: int, like: Tensor) -> Moments:
    """Moments before the first step: no direction, second moment 1. `like`: half planes of the wanted type and device."""
    shape = (classes, 2 * m + 1, m + 1)
    return Moments(like.new_zeros(2, *shape), like.real.new_ones(shape))


def widened(planes: Tensor, m: int) -> Tensor:
    """Half planes (…, 2M'+1, M'+1) within larger ones of radius m, zeros around."""
    own = planes.shape[-1] - 1
    out = planes.new_zeros(*planes.shape[:-2], 2 * m + 1, m + 1)
    out[..., m - own : m + own + 1, : own + 1] = planes
    return out


def narrowed(planes: Tensor, m: int) -> Tensor:
    """The middle of half planes: those of radius m."""
    own = planes.shape[-1] - 1
    return planes[..., own - m : own + m + 1, : m + 1]


def descend(
    planes: Tensor, sums: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], moments: Moments, share: Tensor, pad: float,
    step: float, tau_fudge: float,
) -> tuple[Tensor, Moments, Tensor, Tensor]:  # fmt: skip
    """One step of all classes.

    planes (K, 2M+1, M+1) half planes V of the present averages; sums ((G_1, W_1), (G_2, W_2)) of residuals, Hermitian, like them;
    share (K,) particles of a class over all. Returns new planes, moments, snr (K, shells) float64, and (K,) mean |½(m_1 + m_2)|².
    """
    m, top = planes.shape[-1] - 1, moments.second.shape[-1] - 1
    g = torch.stack([b / w.clamp(min=1) for b, w in sums])
    wide = widened(g, top).to(moments.first)
    first = torch.lerp(moments.first, wide, 1 - MOMENTUM) if moments.begun else wide
    ratio = (wide[0] - wide[1]).abs().square() / ((0.5 * (wide[0] + wide[1])).abs().square() + SMALL)
    second = SECOND_MOMENTUM * moments.second + (1 - SECOND_MOMENTUM) * ratio
    mean = 0.5 * (first[0] + first[1])
    direction = narrowed(mean / (second.sqrt() + SMALL), m)
    shells = int((m - 1) / pad + 0.5) + 1
    noise = shell_means_of_planes(narrowed(first[0] - first[1], m).abs(), pad, shells)
    snr = 2 * tau_fudge * shell_means_of_planes(planes.abs(), pad, shells) / noise.clamp(min=1e-300)
    radius = half_plane_radii(m, planes.device)
    keep = (snr / (1 + snr))[:, (radius / pad + 0.5).long().clamp(max=shells - 1)].to(planes.real)
    rate = step * (1 - torch.exp(-(3 * len(planes) + 10) * share)).to(device=planes.device, dtype=planes.real.dtype)
    change = keep * direction.to(planes) - (1 - keep) * planes
    new = (planes + rate[:, None, None] * change) * (radius <= m - 1)
    power = narrowed(mean, m).abs().square().mean((-2, -1))
    return new, Moments(first, second, True), snr, power


def smoothed(old: Model, new: Model) -> Model:
    """The new model with its noise, priors, scales and norm as running means of the steps (spec 5.1): a mini-batch knows them badly."""
    mix = lambda a, b: MOMENTUM * a + (1 - MOMENTUM) * b  # noqa: E731
    return replace(
        new, sigma2=tuple(mix(a, b) for a, b in zip(old.sigma2, new.sigma2, strict=True)), scales=mix(old.scales, new.scales),
        norm_average=mix(old.norm_average, new.norm_average), sigma_offset=math.sqrt(mix(old.sigma_offset**2, new.sigma_offset**2)),
        pdf_class=mix(old.pdf_class, new.pdf_class), pdf_direction=mix(old.pdf_direction, new.pdf_direction),
        prior_offset=None if old.prior_offset is None or new.prior_offset is None else mix(old.prior_offset, new.prior_offset),
    )  # fmt: skip


def inactive_class(share: Tensor, power: Tensor, threshold: float) -> tuple[int, int] | None:
    """(class to replace, class to copy): the least if its share is below threshold / K, the most active by |g|² p; else None."""
    least = int(share.argmin())
    if float(share[least]) >= threshold / len(share):
        return None
    return least, int((power.cpu() * share).argmax())


def blobs(maps: Tensor, diameter_px: float, generator: torch.Generator) -> Tensor:
    """Start of a gradient run (spec 5.3): random Gaussian blobs with the standard deviation of each of `maps` (K, N, N).

    40 positive blobs less half as strong 40 negative ones, centres normal about the box centre with D/7 px, D/10 px wide, each as high as
    the map is there.
    """
    k, n = maps.shape[0], maps.shape[-1]
    centre = torch.randn(k, 2 * BLOBS, 2, generator=generator, dtype=torch.float64) * diameter_px / 7
    place = (centre + n // 2).round().long().clamp(0, n - 1)
    height = maps.cpu().double()[torch.arange(k)[:, None], place[..., 1], place[..., 0]].abs()
    height = height * torch.where(torch.arange(2 * BLOBS) < BLOBS, 1.0, -0.5)
    line = torch.arange(n, dtype=torch.float64) - n // 2
    x, y = (torch.exp(-((line - centre[..., i, None]) ** 2) / (2 * (diameter_px / 10) ** 2)) for i in (0, 1))
    out = torch.einsum("kb,kby,kbx->kyx", height, y, x)
    scale = maps.cpu().double().std((-2, -1), keepdim=True) / out.std((-2, -1), keepdim=True).clamp(min=1e-300)
    return (out * scale).to(maps)
