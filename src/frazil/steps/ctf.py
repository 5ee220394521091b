"""Defocus, astigmatism and phase shift of a micrograph from its Thon rings (spec/processing 3; docs/steps/ctf.md; maths/thon.py).

    spectrum = micrograph_spectrum(pixels, pixel_size, settings)    or saved_spectrum(amplitudes, pixel_size, settings)
    found = estimate_ctf(spectrum, optics, settings)                found.defocus, found.resolution, found.flags …
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.maths.ctf import wavelength
from frazil.maths.rings import Curves, equiphase_curves, figure_of_merit, ice_ring
from frazil.maths.thon import (
    PolarBins,
    RingFit,
    Rings,
    SearchRange,
    defocus_of,
    fit,
    half_phase,
    make_rings,
    polar_bins,
    polar_mean,
    search,
    visibility,
)
from frazil.maths.tiling import good_size

TILE = 1440.0  # Å, side of the tiles: rings of 6 µm at 4 Å are still told apart
SHARE, LEAST_TILE = 0.62, 900.0  # of a small micrograph's side, and Å: smaller tiles, so that there are several
TAPER = 0.1  # share of a tile's side over which its edges fall off
OVERLAP = 0.5
ON_CPU, ON_GPU = 1, 8  # tiles transformed at a time; on a CPU a tile fits the cache
LEAST_SIDE = 128  # px of a micrograph or a power spectrum
SHOWN = 2.85  # Å, end of the curves; RELION's and our saved spectra end at 2.8
CROSS = 3  # elements beside the axes that are left out: edges of tiles, lines of the detector
SAVED_CROSS = 5  # the same of saved spectra, whose frames had no soft edges
SURE = 60.0  # by how much χ² must fall through the rings: noise reaches 35 (docs/steps/ctf.md)
WORST = 25.0  # Å, written as resolution where none can be told
TILTED = 8.0  # degrees from which a tilt is flagged, if it is three standard deviations
ICE = 0.15  # mean excess of log power in the ice ring that is flagged
MINIMUM_TILES = 4
SHARED = 1.5  # by which the overlap of the tiles widens the variance of a plane through them


@dataclass(frozen=True)
class CtfSettings:
    """How the CTF is estimated. Lengths in Å, angles in degrees."""

    coarsest: float = 30.0
    finest: float = 4.0  # just coarser than the ice ring
    low: float = 3000.0  # range of the mean defocus
    high: float = 60000.0
    astigmatism: float = 3000.0  # largest
    phase_plate: bool = False
    phases: tuple[float, float, float] = (0.0, 180.0, 10.0)  # first, last, step
    box: int = 512  # px of the picture

    @property
    def range(self) -> SearchRange:
        """For maths.thon."""
        if not self.phase_plate:
            return SearchRange(self.low, self.high, (0.0,), self.astigmatism)
        first, last, step = self.phases
        count = max(1, math.ceil((last - first) / step - 1e-6))
        tried = [first + i * (last - first) / count for i in range(count + 1)]
        tried = tried[:-1] if last - first >= 180 else tried  # 180° is 0° again
        return SearchRange(self.low, self.high, tuple(tried), self.astigmatism)


@dataclass(frozen=True)
class Spectrum:
    """A power spectrum in polar bins, by tile, and as a picture."""

    tiles: Tensor  # (t, s, r) float64 mean power of each tile in each bin, each tile's mean 1
    place: Tensor  # (t, 2) Å, xy of the tiles' middles from that of the micrograph
    bins: PolarBins
    lags: Tensor  # (l,) share of a modulation with lag 0, lag_step, … Å that the window leaves
    lag_step: float
    picture: Tensor  # (b, b) float32 centred amplitudes
    picture_pixel: float  # Å

    @property
    def power(self) -> Tensor:
        """(s, r) mean over the tiles."""
        return self.tiles.mean(0)

    def on(self, bins: PolarBins) -> Spectrum:
        """The same where these bins are, which are its own on another device."""
        device = bins.count.device
        return replace(self, tiles=self.tiles.to(device), bins=bins, lags=self.lags.to(device), picture=self.picture.to(device))


@dataclass(frozen=True)
class CtfResult:
    """What is found. Å and degrees."""

    found: bool  # whether there are rings at all
    defocus: Tensor  # (3,) float64 U ≥ V, angle of U from x in (−90, 90]
    phase_shift: float
    error: tuple[float, float, float, float]  # standard deviations: mean defocus, U − V, angle, phase shift
    score: float  # by how much χ² fell through the rings
    fom: float  # correlation of |CTF| with the amplitudes, RELION's rlnCtfFigureOfMerit
    resolution: float  # up to which rings are fitted; WORST where none are
    ice: float  # rlnCtfIceRingDensity
    tilt: tuple[float, float, float]  # degrees, standard deviation, direction of largest defocus from x; NaN where it cannot be told
    curves: Curves
    picture: Tensor  # (b, b) float32: left half the spectrum, right half the model
    picture_pixel: float  # Å
    flags: list[str] = field(default_factory=list)


def tile_layout(shape: tuple[int, int], pixel_size: float) -> tuple[int, list[int], list[int]]:
    """Side of the tiles in px and first rows and columns of the tiles."""
    least = min(shape)
    extent = min(TILE, max(SHARE * least * pixel_size, LEAST_TILE)) / pixel_size
    side = good_size(extent) if least > 1.05 * extent else least // 2 * 2

    def starts(length: int) -> list[int]:
        n = 1 if length - side < 0.1 * side else math.ceil((length - side) / (OVERLAP * side)) + 1
        return [round(i * (length - side) / max(1, n - 1)) for i in range(n)]

    return side, starts(shape[0]), starts(shape[1])


def tile_bins(side: int, pixel_size: float, settings: CtfSettings, device: torch.device | str = "cpu") -> PolarBins:
    """Bins of the transforms of tiles, cropped as `micrograph_spectrum` crops them. Pass them in for many micrographs of one size."""
    n, width = _cropped(side, pixel_size)
    ky = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=device) * width
    kx = torch.arange(n // 2 + 1, dtype=torch.float64, device=device) * width
    limits = (1 / settings.coarsest, min(1 / SHOWN, 0.95 * 0.5 / pixel_size))
    return polar_bins(ky, kx, limits, max(width, 1 / TILE), (CROSS * width, CROSS * width))


def _cropped(side: int, pixel_size: float) -> tuple[int, float]:
    """Side of the transform of a tile cropped to what is used, at least as if pixels were 1.4 Å; and 1/Å of an element."""
    return min(side, math.ceil(side * pixel_size / 1.4 / 2) * 2), 1 / (side * pixel_size)


def micrograph_spectrum(
    image: Tensor, pixel_size: float, settings: CtfSettings, device: torch.device | str = "cpu", bins: PolarBins | None = None
) -> Spectrum:
    """Power spectrum of a micrograph (y, x) of any type, averaged over overlapping tiles with soft edges.

    Raises BadInput for micrographs without contrast, with values that are not finite, or too small.
    """
    if min(image.shape) < LEAST_SIDE:
        raise BadInput(f"is {image.shape[1]} x {image.shape[0]} px; at least {LEAST_SIDE} x {LEAST_SIDE} are needed for a power spectrum")
    image = image.to(device, torch.float32)
    mean, spread = image.mean(), image.std()
    if not bool(torch.isfinite(spread)):
        raise BadInput("holds values that are not finite; make it again")
    if float(spread) <= 1e-6 * abs(float(mean)):
        raise BadInput("every pixel has the same value; leave the micrograph out")
    image = (image - mean).div_(spread).clamp_(-6, 6)  # hot pixels, the black of ice crystals
    side, rows, columns = tile_layout((image.shape[0], image.shape[1]), pixel_size)
    bins = tile_bins(side, pixel_size, settings, device) if bins is None else bins
    n, width = _cropped(side, pixel_size)
    edge = _soft_edges(side, image.device)
    keep = torch.cat([torch.arange(n // 2), torch.arange(side - n // 2, side)]).to(image.device)
    window = edge[:, None] * edge
    nothing = 1e-8 * float(window.square().sum())  # that share of noise's power is rounding: tiles of one value are left out
    together = ON_CPU if image.device.type == "cpu" else ON_GPU
    corners = [(y, x) for y in rows for x in columns]
    parts, means = [], []
    total = torch.zeros(n, n // 2 + 1, device=image.device)
    for start in range(0, len(corners), together):
        tile = torch.stack([image[y : y + side, x : x + side] for y, x in corners[start : start + together]])
        ft = torch.fft.rfft((tile - tile.mean((1, 2), keepdim=True)) * window)[..., : n // 2 + 1]
        power = torch.view_as_real(torch.fft.fft(ft, dim=1)[:, keep]).square().sum(-1)
        polar = polar_mean(power, bins)
        mean = (polar * bins.count).sum((1, 2)) / bins.count.sum()
        scale = torch.where(mean > nothing, 1 / mean, 0.0)[:, None, None]
        parts.append(polar * scale)
        means.append(mean)
        total += (power * scale.float()).sum(0)
    live = torch.cat(means) > nothing
    tiles = torch.cat(parts)[live]
    corner = torch.tensor(corners, dtype=torch.float64)[live.cpu()]
    place = (corner + side / 2 - torch.tensor(image.shape) / 2).flip(-1) * pixel_size
    lags = _autocorrelation(edge)
    picture, picture_pixel = _picture(total / len(tiles), side * pixel_size, settings.box)
    return Spectrum(tiles, place, bins, lags, pixel_size, picture, picture_pixel)


def _soft_edges(side: int, device: torch.device) -> Tensor:
    """(side,) 1 in the middle, a raised cosine at the edges."""
    far = (torch.arange(side, device=device) + 0.5).minimum(side - 0.5 - torch.arange(side, device=device)) / (TAPER * side)
    return 0.5 - 0.5 * torch.cos(math.pi * far.clamp(max=1))


def _autocorrelation(edge: Tensor) -> Tensor:
    """(side,) autocorrelation of the window at lags 0, 1, … px, 1 at 0."""
    ft = torch.fft.rfft(edge.double(), n=2 * len(edge))
    lags = torch.fft.irfft(ft.abs().square())[: len(edge)]
    return lags / lags[0]


def _picture(half: Tensor, extent: float, box: int) -> tuple[Tensor, float]:
    """(b, b) float32 centred amplitudes and the pixel size that b stands for, of half a power spectrum (n, n//2+1); extent: Å of a tile.

    Where n > b, the transform of the spectrum is cropped: neighbouring elements are averaged, none are left out.
    """
    n = half.shape[0]
    lag = torch.fft.irfft2(half, s=(n, n))
    if n > box:
        keep = torch.cat([torch.arange(box // 2), torch.arange(n - box // 2, n)]).to(half.device)
        lag = lag[keep][:, keep]
    b = lag.shape[0]
    power = torch.fft.rfft2(lag).real
    whole = torch.cat([power, torch.roll(power.flip(0), 1, 0)[:, 1 : (b + 1) // 2].flip(1)], 1)
    return torch.fft.fftshift(whole.clamp(min=0)).sqrt().float(), extent / n


def saved_spectrum(amplitudes: Tensor, pixel_size: float, settings: CtfSettings, device: torch.device | str = "cpu",
                   bins: PolarBins | None = None) -> Spectrum:  # fmt: skip
    """A spectrum from centred amplitudes (n, n), as motion correction saves them; pixel_size: that of the spectrum, from its header.

    Raises BadInput where it is not square or holds nothing.
    """
    n = amplitudes.shape[-1]
    if amplitudes.shape != (n, n) or n < LEAST_SIDE or n % 2:
        raise BadInput(f"is {n} x {amplitudes.shape[0]} px; expected a square power spectrum of an even side of at least {LEAST_SIDE}")
    values = amplitudes.to(device).float()
    if not bool(torch.isfinite(values).all()):
        raise BadInput("holds values that are not finite; make it again")
    if float(values.max()) <= float(values.min()) or float(values.min()) < 0:
        raise BadInput("is no spectrum of amplitudes: values are all the same or negative")
    bins = saved_bins(n, pixel_size, settings, device) if bins is None else bins
    power = torch.fft.ifftshift(values)[:, : n // 2 + 1].square()
    polar = polar_mean(power, bins)
    polar = polar / ((polar * bins.count).sum() / bins.count.sum())
    lags = torch.ones(n // 2 + 1, dtype=torch.float64, device=values.device)
    place = torch.zeros(1, 2, dtype=torch.float64)
    picture, step = (values, pixel_size) if n <= settings.box else _picture(power, n * pixel_size, settings.box)
    return Spectrum(polar[None], place, bins, lags, pixel_size, picture, step)


def saved_bins(side: int, pixel_size: float, settings: CtfSettings, device: torch.device | str = "cpu") -> PolarBins:
    """Bins of a saved spectrum of so many px."""
    width = 1 / (side * pixel_size)
    ky = torch.fft.fftfreq(side, pixel_size, dtype=torch.float64, device=device)
    limits = (1 / settings.coarsest, min(1 / SHOWN, 0.97 * 0.5 / pixel_size))
    return polar_bins(ky, ky[: side // 2 + 1].abs(), limits, width, (SAVED_CROSS * width, SAVED_CROSS * width))


def estimate_ctf(spectrum: Spectrum, optics: Optics, settings: CtfSettings) -> CtfResult:
    """Search, fit, and everything that tells how good it is."""
    bins, where = spectrum.bins, settings.range
    power = spectrum.power
    finest = max(settings.finest, 1 / float(bins.k.max()))
    weight = bins.count * (bins.k <= 1 / finest)
    rings = make_rings(power, weight, bins, optics, spectrum.lags, spectrum.lag_step)
    best = fit(rings, search(rings, where), where)
    whole = make_rings(power, bins.count, bins, optics, spectrum.lags, spectrum.lag_step)
    curves = equiphase_curves(whole, best.theta)
    defocus, phase = defocus_of(best.theta)
    picture, fom = figure_of_merit(spectrum.picture, spectrum.picture_pixel, optics, best.theta, (settings.coarsest, max(5.0, finest)))
    density, excess = ice_ring(curves)
    tilt = local_tilt(spectrum, rings, best)
    found = best.gain > SURE and curves.resolution < WORST
    resolution = curves.resolution if found else WORST
    flags = _flags(best, settings, tilt, excess) if found else ["no Thon rings found"]
    return CtfResult(found, defocus.cpu(), float(phase), _errors(best), best.gain, fom, resolution, density, tilt, curves, picture,
                     spectrum.picture_pixel, flags)  # fmt: skip


def _errors(best: RingFit) -> tuple[float, float, float, float]:
    """Standard deviations of mean defocus, U − V, angle (degrees) and phase shift (degrees)."""
    c, s = best.theta[1:3]
    half = max(float(torch.hypot(c, s)), 1e-6)
    along = torch.stack([c, s]) / half
    spread = best.covariance[1:3, 1:3]
    across = torch.stack([-along[1], along[0]])
    values = best.covariance[0, 0], 4 * along @ spread @ along, across @ spread @ across, best.covariance[3, 3]
    mean, size, turn, phase = (math.sqrt(max(0.0, float(v))) for v in values)
    return mean, size, min(90.0, math.degrees(0.5 * turn / half)), math.degrees(phase)


def _flags(best: RingFit, settings: CtfSettings, tilt: tuple[float, float, float], excess: float) -> list[str]:
    """What a user should look at."""
    mean, half = float(best.theta[0]), float(best.theta[1:3].norm())
    flags = []
    if mean < settings.low + 100 or mean > settings.high - 100:
        flags.append(f"defocus {mean:.0f} Å at the limit of the range searched")
    if 2 * half > 0.95 * settings.astigmatism:
        flags.append(f"astigmatism {2 * half:.0f} Å at the limit of the range searched")
    if excess > ICE:
        flags.append(f"ice ring at 3.7 Å: {100 * (math.exp(excess) - 1):.0f} % above its surroundings")
    if tilt[0] > TILTED and tilt[0] > 3 * tilt[1]:
        flags.append(f"tilted by about {tilt[0]:.0f}°: defocus differs over the field")
    return flags


def local_tilt(spectrum: Spectrum, rings: Rings, best: RingFit) -> tuple[float, float, float]:
    """(degrees, standard deviation, direction in which the defocus grows) of a plane through the tiles' defocus; NaN: not known."""
    t = len(spectrum.tiles)
    if t < MINIMUM_TILES or best.gain <= SURE or float(spectrum.place.std(0).min()) < 200:
        return math.nan, math.nan, math.nan
    lam = wavelength(rings.optics.voltage)
    step = 0.5 / (2 * math.pi * lam * float(rings.terms[0].max()))
    reach = max(20, math.ceil(1500 / step))
    offset = torch.arange(-reach, reach + 1, device=rings.data.device).double() * step
    theta = best.theta[None].repeat(len(offset), 1)
    theta[:, 0] += offset
    seen = best.envelope / visibility(rings.terms, best.theta[None, :1], rings)[0].clamp(min=1e-3)
    model = -torch.cos(2 * half_phase(rings.terms, theta, rings.optics)) * visibility(rings.terms, theta[:, :1], rings) * seen * rings.root
    model = model - (model @ rings.basis) @ rings.basis.T
    data = spectrum.tiles[:, rings.use].clamp(min=1e-6).log() * rings.root
    data = data - (data @ rings.basis) @ rings.basis.T
    data = data.clamp(-5 * data.std(), 5 * data.std())
    score = data @ model.T - 0.5 * model.square().sum(-1)  # (t, offsets) log-likelihood × variance
    top = score.argmax(-1).clamp(1, len(offset) - 2)
    a, b, c = (score.gather(1, (top + i)[:, None])[:, 0] for i in (-1, 0, 1))
    bend = (a - 2 * b + c).clamp(max=-1e-12)
    local = offset[top] + step * (0.5 * (a - c) / bend).clamp(-1, 1)
    variance = data.square().mean(-1) / (-bend / step**2)
    return _plane(spectrum.place, local.cpu(), variance.cpu())


def _plane(place: Tensor, local: Tensor, variance: Tensor) -> tuple[float, float, float]:
    """Tilt of the plane through local defoci. Tiles far off the plane count less."""
    design = torch.cat([torch.ones(len(place), 1, dtype=torch.float64), place], -1)
    weight = 1 / (variance + 20.0**2)
    for _ in range(5):
        normal = design.T @ (design * weight[:, None])
        fitted = torch.linalg.solve(normal, design.T @ (weight * local))
        left = (local - design @ fitted).abs()
        spread = 1.4826 * float(left.median()) + 10.0
        weight = (1 / (variance + spread**2)) * (2 * spread / left.clamp(min=2 * spread))
    covariance = torch.linalg.inv(design.T @ (design * weight[:, None])) * SHARED
    slope = float(fitted[1:].norm())
    error = math.sqrt(max(0.0, float(fitted[1:] @ covariance[1:, 1:] @ fitted[1:]))) / max(slope, 1e-12)
    return math.degrees(math.atan(slope)), math.degrees(error), math.degrees(math.atan2(float(fitted[2]), float(fitted[1])))
