"""Particles in micrographs by template matching (spec/processing 4; Roseman 2003).

x: the micrograph, contrast inverted, mean 0, standard deviation 1. mu, sigma: its mean and standard deviation in a ring around each place.
A: template, ⟨·⟩ = sum over the mask's pixels / their number, C = ⟨x A⟩ at each place and in-plane angle, A with the micrograph's CTF:

    D = ⟨A²⟩ − 2 (C − mu ⟨A⟩)/sigma,    R = exp(−D/2),    FOM = (R − 1)/(exp(⟨A²⟩/2) − 1)

so FOM is 1 for the template itself, 0 where background is as likely. mu and sigma are of the unfiltered micrograph: FOM does not depend
on the low-pass. Its noise does: in white noise it has the standard deviation 2/sqrt(n⟨A²⟩), n the micrograph's pixels under the mask,
another one for every template and defocus. `z` is the sum in units of its noise, (C − mu ⟨A⟩)/sigma · sqrt(n/⟨A²⟩), the largest over
templates and angles, less its median over the micrograph, over its spread there. `ncc`: correlation of template and micrograph under the
mask over sqrt(S + median of S), S: the micrograph's sum of squares there. That is the correlation coefficient, in [−1, 1], brought down
where contrast is low. At the edge of a micrograph sums go over what is visible. Best angle and template are found by ops.correlate on tiles
(overlap-save), so memory is bounded.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frazil.data import Optics
from frazil.maths.ctf import ctf
from frazil.maths.masks import soft_edge
from frazil.maths.micrographs import blank_border, normalised
from frazil.maths.peaks import local_maxima, refine_peaks, thinned
from frazil.maths.templates import (
    is_round,
    kernel_disc,
    lowpass_templates,
    mask_templates,
    standardised,
    template_reach,
    turned_templates,
)
from frazil.maths.tiling import Tiling, WorkGrid, frequencies, half_plane, joined, on_micrograph, tile_axis, tiles_ft, transform, work_grid
from frazil.ops.correlate import correlate_max_

OVERSAMPLED = 1.5  # samples of the work grid over what the low-pass needs (docs/steps/pick.md: recall against this)
RING = 1.4  # outer radius of the ring of local statistics, of the particle's radius
LONGEST_TILE = {"cpu": 400, "cuda": 1200}  # work pixels: on a CPU a batch of transforms should stay in the cache
CTF_POINTS = 1 << 21  # evaluated at a time
SAMPLE = 1 << 16  # places from which the usual z of a micrograph is taken
QUARTILES = 1.349  # their distance in a normal distribution of standard deviation 1
STATS_FLOOR = 1e-3  # sigma below this is a dead area
MANY = 50_000  # maxima of a score map
PREVIEW = 1024  # px, longest side of a picture


@dataclass(frozen=True)
class PickSettings:
    """How to pick. Lengths in Å."""

    diameter: float  # of the mask around a particle
    lowpass: float = 20.0  # 0: none
    angular_step: float = 5.0  # degrees
    score: str = "fom"  # or "z" or "ncc"
    invert: bool = True  # particles are dark in the micrographs
    intact_first_peak: bool = False  # CTF is 1 up to its first maximum
    cache_bytes: int = 1 << 30  # memory for transforms of turned templates


@dataclass(frozen=True)
class Bank:
    """Templates ready for one grid: made once a job, used for every micrograph of the same size and pixel."""

    grid: WorkGrid
    settings: PickSettings
    psi: Tensor  # (r,) degrees
    masked: Tensor  # (t, N, N) masked templates at their own pixel
    pixel_size: float  # Å of those
    reach: int
    tiles: tuple[Tiling, Tiling]  # y, x
    round: tuple[bool, ...]  # templates that look the same at every angle
    power: Tensor  # (t, shells) of |A|², summed over the shell, / (T_y T_x n_mask), up to the low-pass
    shell: float  # 1/Å, width of those shells
    mean: Tensor  # (t,) ⟨A⟩ before the CTF
    n_mask: float  # work pixels
    ring_ft: Tensor  # transform of the ring
    disc_ft: Tensor  # transform of the particle's disc
    ring_count: Tensor  # (h, w) visible pixels of the ring at each place
    disc_share: Tensor  # (h, w) visible share of the disc at each place
    cached: dict[int, Tensor] = field(default_factory=dict)  # transforms of turned templates by template

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.masked.device

    def references(self, template: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first angle, transforms (r', T_y, T_x//2+1)) of a template, from the cache or made in pieces."""
        if template in self.cached:
            yield 0, self.cached[template]
            return
        height, width = self.tiles[0].size, self.tiles[1].size
        piece = max(1, min(len(self.psi), self.settings.cache_bytes // (2 * 8 * height * (width // 2 + 1))))
        psi = self.psi[:1] if self.round[template] else self.psi
        for start in range(0, len(psi), piece):
            yield start, torch.fft.rfft2(self.kernels(template, psi[start : start + piece]), s=(height, width))

    def kernels(self, template: int, psi: Tensor) -> Tensor:
        """(r, 2h+1, 2h+1) turned templates; for ncc of weighted mean 0 and norm 1 under the mask."""
        turned = turned_templates(self.masked[template : template + 1], self.pixel_size, self.grid.work_pixel, psi, self.reach)[0]
        disc = kernel_disc(self.reach, self.settings.diameter / self.grid.work_pixel, turned)
        return standardised(turned, disc) if self.is_ncc else turned

    @property
    def is_ncc(self) -> bool:
        """Which score."""
        return self.settings.score == "ncc"


@dataclass(frozen=True)
class Prepared:
    """A micrograph on its work grid."""

    image: Tensor  # (h, w) low-passed, multiplied by the CTF
    mu: Tensor  # (h, w) local mean
    sigma: Tensor  # (h, w) local standard deviation
    ctf2: Tensor  # (shells,) mean CTF² on the bank's shells
    ctf0: Tensor  # () CTF at k = 0; on the device, which nothing waits for
    border: tuple[float, float, float, float]  # px at top, bottom, left, right that hold nothing new
    preview: Tensor | None = None  # (h', w') float16, low-passed micrograph as it is, for pictures


@dataclass(frozen=True)
class ScoreMap:
    """What template matching gives for a micrograph, on its work grid (h, w)."""

    grid: WorkGrid
    value: Tensor  # FOM, z or ncc of the best template and angle
    psi: Tensor  # degrees
    template: Tensor  # int16, from 0
    mu: Tensor
    sigma: Tensor
    border: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # px at top, bottom, left, right to leave out


@dataclass(frozen=True)
class Picks:
    """Candidates of a micrograph, best first."""

    xy: Tensor  # (n, 2) float64, px of the micrograph
    value: Tensor  # (n,)
    psi: Tensor  # (n,) degrees
    template: Tensor  # (n,) from 0
    area: float  # share of the searched area that is above the threshold
    size: Tensor | None = None  # (n,) Å, the best diameter (LoG)


def picking_grid(shape: tuple[int, int], pixel_size: float, lowpass: float, margin: float) -> WorkGrid:
    """The work grid of micrographs (y, x) px, finer than the low-pass needs: with Nyquist at its end peaks between pixels are missed."""
    return work_grid(shape, pixel_size, lowpass / OVERSAMPLED, margin)


def make_bank(templates: Tensor, pixel_size: float, shape: tuple[int, int], micrograph_pixel: float, settings: PickSettings) -> Bank:
    """The bank of templates (t, N, N) of `pixel_size`, white on black, for micrographs (y, x) px of `micrograph_pixel`; on their device."""
    grid = picking_grid(shape, micrograph_pixel, settings.lowpass, 0.5 * RING * settings.diameter)
    reach = template_reach(settings.diameter, grid.work_pixel)
    finest = max(settings.lowpass, 2 * grid.work_pixel)
    masked = lowpass_templates(mask_templates(templates.float(), pixel_size, settings.diameter), pixel_size, finest)
    longest = LONGEST_TILE.get(masked.device.type, LONGEST_TILE["cuda"])
    tiles = (tile_axis(grid.visible[0], reach, longest), tile_axis(grid.visible[1], reach, longest))
    n = max(1, round(360 / settings.angular_step))
    psi = torch.arange(n, dtype=torch.float64, device=masked.device) * (360 / n)
    ring, disc = _ring(grid, settings.diameter, masked.device), _ring(grid, settings.diameter, masked.device, disc=True)
    visible = transform(torch.ones(grid.shape, device=masked.device), grid)
    n_mask = float(disc.sum())
    ring_ft, disc_ft = torch.fft.rfft2(ring), torch.fft.rfft2(disc)
    count, share = (on_micrograph(torch.fft.irfft2(visible * ft.conj(), s=grid.size), grid) for ft in (ring_ft, disc_ft))
    bank = Bank(grid, settings, psi, masked, pixel_size, reach, tiles, (), masked.new_zeros(0), 0.0, masked.new_zeros(0), n_mask,
                ring_ft, disc_ft, count.clamp(min=1), (share / n_mask).clamp(0.05, 1.0))  # fmt: skip
    few = psi[:: max(1, n // 12)]
    rounds = tuple(is_round(bank.kernels(t, few)) for t in range(len(masked)))
    power, shell = _template_power(bank)
    plain = replace(bank, settings=replace(settings, score="fom"))
    mean = torch.stack([plain.kernels(t, psi[:1]).sum() / n_mask for t in range(len(masked))])
    bank = replace(bank, round=rounds, power=power, shell=shell, mean=mean)
    each = n * tiles[0].size * (tiles[1].size // 2 + 1) * 8
    for t in range(len(masked)):
        if (len(bank.cached) + 1) * each <= settings.cache_bytes:
            bank.cached[t] = torch.cat([part for _, part in bank.references(t)])
    return bank


def rescaled(bank: Bank, factor: float) -> Bank:
    """The same templates times `factor`: FOM depends on their grey scale."""
    cached = {t: values * factor for t, values in bank.cached.items()}
    return replace(bank, masked=bank.masked * factor, power=bank.power * factor**2, mean=bank.mean * factor, cached=cached)


def prepare(
    micrograph: Tensor, bank: Bank, optics: Optics | None = None, defocus: Tensor | None = None, phase_shift: float = 0.0
) -> Prepared:
    """A micrograph (y, x) of any real type, on the bank's device, brought to its work grid; with its CTF where it is given.

    defocus (3,): u, v in Å, angle in degrees; phase shift in degrees. Pixels that are not finite count as the mean.
    """
    grid = bank.grid
    x = normalised(micrograph, bank.settings.invert)
    ft = transform(x, grid)
    shown = preview(ft, grid, -1.0 if bank.settings.invert else 1.0)
    squares = transform(x.square_(), grid)
    mu = on_micrograph(torch.fft.irfft2(ft * bank.ring_ft.conj(), s=grid.size), grid) / bank.ring_count
    power = on_micrograph(torch.fft.irfft2(squares * bank.ring_ft.conj(), s=grid.size), grid) / bank.ring_count
    sigma = (power - mu.square()).clamp(min=0).sqrt()
    del squares, power
    ctf2 = torch.ones(bank.power.shape[-1], device=x.device)
    ctf0 = ctf2[0]
    if optics is not None and defocus is not None:
        mode = "intact_first_peak" if bank.settings.intact_first_peak else "normal"
        optics = replace(optics, pixel_size=grid.pixel_size)
        _multiply_ctf_(ft, grid, lambda k: _ctf(k, optics, defocus, phase_shift, mode))
        ctf2, ctf0 = _ctf_of_shells(bank, optics, defocus, phase_shift, mode)
    if bank.settings.lowpass > 2 * grid.pixel_size:
        ft *= half_plane(grid, x.device) <= bank.settings.lowpass**-2
    image = on_micrograph(torch.fft.irfft2(ft, s=grid.size), grid).contiguous()
    sigma = torch.where(sigma > STATS_FLOOR, sigma, torch.ones_like(sigma))
    return Prepared(image, mu, sigma, ctf2, ctf0, blank_border(micrograph), shown)


def match(prepared: Prepared, bank: Bank) -> ScoreMap:
    """Score of the best template and angle at every work pixel: the most probable ones (largest R), or of the largest z or ncc."""
    tiles = tiles_ft(prepared.image, bank.tiles, bank.reach)
    shape = (len(tiles), bank.tiles[0].size, bank.tiles[1].size)
    h, w = prepared.image.shape
    squares = (bank.power * prepared.ctf2).sum(-1)  # ⟨A²⟩ of whole templates
    strength = torch.full((h, w), -torch.inf, device=bank.device)
    angle, template = (torch.zeros(h, w, dtype=torch.int16, device=bank.device) for _ in range(2))
    for t in range(len(bank.masked)):
        best = torch.full(shape, -torch.inf, device=bank.device)
        index = torch.zeros(shape, dtype=torch.int16, device=bank.device)
        for first, references in bank.references(t):
            correlate_max_(tiles, references, shape[2], best, index, first=first)
        found = _strength(joined(best, bank.tiles, h, w), t, squares[t] * bank.disc_share, prepared, bank)
        better = found > strength
        strength = torch.where(better, found, strength)
        angle = torch.where(better, joined(index, bank.tiles, h, w), angle)
        template = torch.where(better, torch.full_like(template, t), template)
    match bank.settings.score:
        case "ncc":
            value = strength / _footprint_deviation(prepared, bank)
        case "z":
            value = _above_usual(strength)
        case _:
            value = torch.expm1(strength) / torch.expm1(0.5 * squares[template.long()] * bank.disc_share)
    psi = bank.psi[angle.long()].float()
    return ScoreMap(bank.grid, value, psi, template, prepared.mu, prepared.sigma, prepared.border)


def _strength(sums: Tensor, template: int, square: Tensor, prepared: Prepared, bank: Bank) -> Tensor:
    """(h, w) by what templates compete for a place, of Σ x A and ⟨A²⟩ there: log R, standard deviations of white noise, or the sum itself.

    FOM itself would prefer the weaker of two templates at a strong particle.
    """
    if bank.is_ncc:
        return sums
    gain = _gain(sums, template, prepared, bank)
    pixels = bank.n_mask / (bank.grid.scale[0] * bank.grid.scale[1])  # of the micrograph: its noise is 1 in those
    return gain * (pixels / square).sqrt() if bank.settings.score == "z" else gain - 0.5 * square


def _above_usual(strength: Tensor) -> Tensor:
    """(h, w) less the median, over the standard deviation that the quartiles tell (of about SAMPLE places).

    Coloured noise, ice and a far defocus make all of a micrograph's maxima higher: one threshold must serve a whole set.
    """
    step = max(1, math.isqrt(strength.numel() // SAMPLE))
    sample = strength[::step, ::step].flatten().sort().values
    low, middle, high = (sample[round(share * (len(sample) - 1))] for share in (0.25, 0.5, 0.75))
    return (strength - middle) * (QUARTILES / (high - low).clamp(min=1e-6))


def _gain(sums: Tensor, template: int, prepared: Prepared, bank: Bank) -> Tensor:
    """(h, w) (C − mu ⟨A⟩)/sigma."""
    mean = bank.mean[template] * prepared.ctf0 * bank.disc_share
    return (sums / bank.n_mask - prepared.mu * mean) / prepared.sigma


def amplitudes(prepared: Prepared, bank: Bank) -> Tensor:
    """(h, w) factor a by which the best template must be multiplied to fit each place best: (C − mu ⟨A⟩)/(sigma ⟨A²⟩)."""
    if bank.is_ncc:
        raise ValueError("the grey scale of templates matters to the figure of merit only")
    tiles = tiles_ft(prepared.image, bank.tiles, bank.reach)
    shape = (len(tiles), bank.tiles[0].size, bank.tiles[1].size)
    h, w = prepared.image.shape
    strength = torch.full((h, w), -torch.inf, device=bank.device)
    out = torch.zeros_like(strength)
    for t in range(len(bank.masked)):
        best, index = torch.full(shape, -torch.inf, device=bank.device), torch.zeros(shape, dtype=torch.int16, device=bank.device)
        for first, references in bank.references(t):
            correlate_max_(tiles, references, shape[2], best, index, first=first)
        square = (bank.power[t] * prepared.ctf2).sum() * bank.disc_share
        gain = _gain(joined(best, bank.tiles, h, w), t, prepared, bank)
        better = gain / square.sqrt() > strength
        strength = torch.where(better, gain / square.sqrt(), strength)
        out = torch.where(better, gain / square, out)
    return out


def candidates(
    scores: ScoreMap, threshold: float, edge: float, max_deviation: float = -1.0, min_mean: float = -999.0, level: float | None = None,
    distance: float = 0.0,
) -> Picks:
    """Local maxima ≥ threshold, ≥ `edge` Å from the border, where sigma ≤ max_deviation (≤ 0: any) and mu ≥ min_mean.

    `area` is the share of the searched area that is above `level` (the threshold if not given). Of maxima nearer than `distance` Å to each
    other those may be missing that maths.peaks.highest_apart would not accept at that distance.
    """
    h, w = scores.value.shape
    rows = torch.arange(h, device=scores.value.device) / scores.grid.scale[0]
    columns = torch.arange(w, device=scores.value.device) / scores.grid.scale[1]
    top, bottom, left, right = (width + edge / scores.grid.pixel_size for width in scores.border)
    allowed = ((rows >= top) & (rows <= scores.grid.shape[0] - 1 - bottom))[:, None]
    allowed = allowed & ((columns >= left) & (columns <= scores.grid.shape[1] - 1 - right))
    searched = allowed.sum().clamp(min=1)
    if max_deviation > 0:
        allowed = allowed & (scores.sigma <= max_deviation)
    allowed = allowed & (scores.mu >= min_mean)
    peaks = local_maxima(scores.value, allowed, threshold)
    area = (allowed & (scores.value >= (threshold if level is None else level))).sum() / searched
    values = scores.value[peaks[:, 0], peaks[:, 1]]
    order = values.argsort(descending=True, stable=True)
    peaks, values = peaks[order], values[order].double()
    xy = refine_peaks(scores.value, peaks).flip(-1)
    xy[:, 0] /= scores.grid.scale[1]
    xy[:, 1] /= scores.grid.scale[0]
    xy[:, 0].clamp_(0, scores.grid.shape[1] - 1.0)
    xy[:, 1].clamp_(0, scores.grid.shape[0] - 1.0)
    # Some ten thousand are thinned in less time where the picks are chosen, beside the device's work, than in many small steps on it.
    kept = thinned(xy, distance / scores.grid.pixel_size) if len(xy) > MANY else torch.arange(len(xy), device=xy.device)
    y, x = peaks[kept].unbind(-1)
    parts = (values[kept], scores.psi[y, x].double(), scores.template[y, x].double(), area.double().expand(len(kept)))
    found = torch.cat([xy[kept], torch.stack(parts, -1)], -1).cpu()  # in one piece: each copy waits for the device
    share = float(found[0, 5]) if len(found) else float(area)
    return Picks(found[:, :2].contiguous(), found[:, 2].float(), found[:, 3].float(), found[:, 4].to(scores.template.dtype), share)


# ---- pieces


def preview(ft: Tensor, grid: WorkGrid, sign: float) -> Tensor:
    """(h, w) float16 picture of a micrograph from its transform on the work grid, at most PREVIEW px long."""
    factor = max(1.0, max(grid.visible) / PREVIEW)
    h, w = (2 * round(m / factor / 2) for m in grid.size)
    out = ft
    if factor > 1:
        out = ft.new_zeros(h, w // 2 + 1)
        out[: h // 2, : w // 2] = ft[: h // 2, : w // 2]
        out[h - h // 2 + 1 :, : w // 2] = ft[grid.size[0] - h // 2 + 1 :, : w // 2]
    picture = torch.fft.irfft2(out, s=(h, w)) * (sign * h * w / (grid.size[0] * grid.size[1]))
    rows, columns = (math.ceil(n * m / p) for n, m, p in zip(grid.shape, (h, w), grid.padded, strict=True))
    return picture[:rows, :columns].half()


def _row_parts(grid: WorkGrid) -> Iterator[slice]:
    """Slices of rows that hold about CTF_POINTS frequencies."""
    step = max(1, CTF_POINTS // (grid.size[1] // 2 + 1))
    yield from (slice(start, min(start + step, grid.size[0])) for start in range(0, grid.size[0], step))


def _multiply_ctf_(ft: Tensor, grid: WorkGrid, value: Callable[[Tensor], Tensor]) -> None:
    """Multiply a half transform by value(k (p, 2)) in place, some rows at a time."""
    for rows in _row_parts(grid):
        ky, kx = frequencies(grid, rows, ft.device)
        k = torch.stack(torch.broadcast_tensors(kx[None, :], ky[:, None]), -1)
        ft[rows] *= value(k.reshape(-1, 2)).reshape(len(ky), len(kx)).to(ft.real.dtype)


def _ctf(k: Tensor, optics: Optics, defocus: Tensor, phase_shift: float, mode: str) -> Tensor:
    """(p,) float32 CTF at k (p, 2)."""
    one = torch.ones(1, dtype=torch.float64)  # not on the device: ctf looks at B-factor and scale, which would wait for all work there
    phase = torch.full((1,), phase_shift, dtype=torch.float64, device=k.device)
    return ctf(k, defocus.to(k)[None], phase, 0 * one, one, optics, mode=mode, dtype=torch.float32)[0]


def _ctf_of_shells(bank: Bank, optics: Optics, defocus: Tensor, phase_shift: float, mode: str) -> tuple[Tensor, Tensor]:
    """(shells,) CTF² on the bank's shells, averaged over 16 directions of half a plane, and the CTF at k = 0."""
    r = torch.arange(bank.power.shape[-1], device=bank.device, dtype=torch.float64) * bank.shell
    turn = torch.arange(16, device=bank.device, dtype=torch.float64) * (math.pi / 16)
    k = torch.stack([r * turn.cos()[:, None], r * turn.sin()[:, None]], -1)
    values = _ctf(k.reshape(-1, 2), optics, defocus, phase_shift, mode)
    return values.square().reshape(16, -1).mean(0), values[0]


def _ring(grid: WorkGrid, diameter: float, device: torch.device, disc: bool = False) -> Tensor:
    """(m_y, m_x) ring of the local statistics (or the particle's disc) around pixel 0 of the work grid, wrapped, one pixel soft."""
    lines = [torch.fft.fftfreq(m, 1 / m, device=device) / s * grid.pixel_size for m, s in zip(grid.size, grid.scale, strict=True)]
    r = (lines[0][:, None].square() + lines[1].square()).sqrt() / grid.work_pixel
    inner = 0.5 * diameter / grid.work_pixel
    inside = soft_edge(r, inner - 0.5, 1.0)
    return inside if disc else soft_edge(r, max(RING * inner, inner + 2) - 0.5, 1.0) - inside


def _template_power(bank: Bank) -> tuple[Tensor, float]:
    """(t, shells) of the bank and the width of a shell, 1/Å."""
    height, width = bank.tiles[0].size, bank.tiles[1].size
    plain = replace(bank, settings=replace(bank.settings, score="fom"))
    ky = torch.fft.fftfreq(height, bank.grid.work_pixel, device=bank.device)
    kx = torch.arange(width // 2 + 1, device=bank.device) / (width * bank.grid.work_pixel)
    k = (ky[:, None].square() + kx.square()).sqrt()
    shell = 1 / (max(height, width) * bank.grid.work_pixel)
    highest = 1 / bank.settings.lowpass if bank.settings.lowpass > 2 * bank.grid.pixel_size else float(k.max())
    weight = torch.full((width // 2 + 1,), 2.0, device=bank.device)
    weight[0] = weight[-1] = 1.0
    bins = (k / shell).round().long()
    keep = k <= highest
    rows = []
    for t in range(len(bank.masked)):
        ft = torch.fft.rfft2(plain.kernels(t, bank.psi[:1]), s=(height, width))[0]
        power = (ft.real.square() + ft.imag.square()) * weight
        rows.append(torch.bincount(bins[keep], power[keep].double(), minlength=int(bins[keep].max()) + 1))
    return (torch.stack(rows) / (height * width * bank.n_mask)).float(), shell


def _footprint_deviation(prepared: Prepared, bank: Bank) -> Tensor:
    """(h, w) sqrt(Σ disc (y − ȳ)² + its median) of the work image under the particle's disc.

    Without the median faint noise that happens to resemble a template would score as a particle does (docs/steps/pick.md).
    """
    sums = []
    for values in (prepared.image, prepared.image.square()):
        ft = torch.fft.rfft2(values, s=bank.grid.size)
        sums.append(on_micrograph(torch.fft.irfft2(ft * bank.disc_ft.conj(), s=bank.grid.size), bank.grid))
    number = bank.disc_share * bank.n_mask
    spread = (sums[1] - sums[0].square() / number).clamp(min=0)
    usual = (spread / bank.disc_share).median() * bank.disc_share  # partly visible places hold less
    return (spread + usual).clamp(min=1e-6 * spread.mean()).sqrt()
