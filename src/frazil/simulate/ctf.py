"""Micrographs with a known CTF, for its estimation: ice, particles, inelastic background, counts (spec/processing 3.11).

    counts = Poisson( N (1 + 2 IFT[ sin χ(k; Δf(x, y)) e^{−B k²/4} φ(k) ] + inelastic) ),      N = dose · a²

φ is the phase shift of the specimen: ice, white, of `ice` rad·Å (4 ice² dose is the height of the Thon rings over the shot noise at
low frequency), and particles of a phantom. The inelastic part is smooth and carries no rings. With a tilt the defocus grows across the
field, in steps too small to see.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import Optics
from frazil.maths.ctf import ctf
from frazil.maths.fourier import image_from_ft
from frazil.maths.rotation import random_rotations
from frazil.simulate.movies import paste
from frazil.simulate.phantom import phantom, project_phantom

ROWS = 128  # of the transform at a time
LEVELS = 9  # of defocus across a tilted field
LONG = 60.0  # Å, beyond which the inelastic part has no detail
ICE_RING_WIDTH = 0.006  # 1/Å


@dataclass(frozen=True)
class CtfMicrographSettings:
    """How a micrograph is made. Å, degrees, e/Å²."""

    shape: tuple[int, int] = (2048, 2048)  # px (y, x)
    dose: float = 30.0
    b_factor: float = 60.0
    ice: float = 0.058  # rad·Å; 0.058: rings as high as on a Krios (EPU example of mrcfile)
    particles: int = 60
    contrast: float = 0.08  # rad, of the particles' projections
    inelastic: float = 0.03  # relative spread of the smooth background
    ice_ring: float = 0.0  # power of crystalline ice at 3.7 Å over that of the shot noise
    tilt: float = 0.0
    tilt_direction: float = 0.0  # of largest defocus, from x
    seed: int = 1


def simulate_ctf_micrograph(optics: Optics, settings: CtfMicrographSettings, defocus: Tensor, phase_shift: float = 0.0) -> Tensor:
    """(y, x) float32 counts; defocus (3,): U, V in Å, angle in degrees, in the middle of the field; phase_shift in degrees."""
    h, w = settings.shape
    rng = torch.Generator().manual_seed(settings.seed)
    a = optics.pixel_size
    specimen = torch.randn(h, w, generator=rng) * (settings.ice / a)
    if settings.particles:
        specimen = specimen + _particles(optics, settings, rng)
    ft = torch.fft.rfft2(specimen)
    if settings.tilt:
        reach = 0.5 * math.hypot(h, w) * a * math.tan(math.radians(settings.tilt))
        offsets = torch.linspace(-reach, reach, LEVELS, dtype=torch.float64)
        wave = torch.stack([_imaged(ft, optics, settings, defocus + torch.tensor([d, d, 0.0]), phase_shift) for d in offsets.tolist()])
        y, x = torch.meshgrid(torch.arange(h) - h / 2, torch.arange(w) - w / 2, indexing="ij")
        turn = math.radians(settings.tilt_direction)
        place = ((x * math.cos(turn) + y * math.sin(turn)) * a * math.tan(math.radians(settings.tilt)) + reach) / (2 * reach) * (LEVELS - 1)
        lower = place.long().clamp(0, LEVELS - 2)
        share = place - lower
        wave = (wave.gather(0, lower[None]) * (1 - share) + wave.gather(0, lower[None] + 1) * share)[0]
    else:
        wave = _imaged(ft, optics, settings, defocus, phase_shift)
    rate = 1 + 2 * wave + _background(settings, a, rng)
    return torch.poisson(settings.dose * a**2 * rate.clamp(min=0), generator=rng)


def noise_micrograph(optics: Optics, settings: CtfMicrographSettings) -> Tensor:
    """(y, x) float32 counts of nothing: shot noise and a smooth background, no rings."""
    rng = torch.Generator().manual_seed(settings.seed)
    rate = 1 + _background(settings, optics.pixel_size, rng)
    return torch.poisson(settings.dose * optics.pixel_size**2 * rate.clamp(min=0), generator=rng)


def _imaged(ft: Tensor, optics: Optics, settings: CtfMicrographSettings, defocus: Tensor, phase_shift: float) -> Tensor:
    """(y, x) phase shifts as the microscope shows them at one defocus."""
    h, w = settings.shape
    kx = torch.fft.rfftfreq(w, optics.pixel_size, dtype=torch.float64)
    one, out = torch.ones(1, dtype=torch.float64), torch.empty_like(ft)
    for rows, ky in zip(torch.arange(h).split(ROWS), torch.fft.fftfreq(h, optics.pixel_size, dtype=torch.float64).split(ROWS), strict=True):
        k = torch.stack(torch.broadcast_tensors(kx, ky[:, None]), -1).reshape(-1, 2)
        values = ctf(k, defocus[None].double(), phase_shift * one, settings.b_factor * one, one, optics, dtype=torch.float32)
        out[rows] = ft[rows] * values.reshape(len(rows), -1)
    return torch.fft.irfft2(out, s=(h, w))


def _particles(optics: Optics, settings: CtfMicrographSettings, rng: torch.Generator) -> Tensor:
    """(y, x) phase shift of particles anywhere in the field."""
    box = max(32, round(200 / optics.pixel_size / 2) * 2)
    item = replace(optics, box=box)
    rotations = random_rotations(settings.particles, rng)
    stamps = image_from_ft(project_phantom(phantom(box, optics.pixel_size, "C1", settings.seed), rotations, item), box)
    stamps = stamps * (settings.contrast / float(stamps.amax()))
    size = torch.tensor([settings.shape[1], settings.shape[0]], dtype=torch.float64)
    return paste(stamps, torch.rand(settings.particles, 2, generator=rng, dtype=torch.float64) * size, settings.shape)


def _background(settings: CtfMicrographSettings, pixel_size: float, rng: torch.Generator) -> Tensor:
    """(y, x) smooth inelastic part, and crystalline ice without direction."""
    h, w = settings.shape
    k2 = torch.fft.fftfreq(h, pixel_size).square()[:, None] + torch.fft.rfftfreq(w, pixel_size).square()
    smooth = torch.fft.irfft2(torch.fft.rfft2(torch.randn(h, w, generator=rng)) / (1 + k2 * LONG**2), s=(h, w))
    out = settings.inelastic * smooth / smooth.std()
    if settings.ice_ring > 0:
        ring = torch.exp(-0.5 * ((k2.sqrt() - 1 / 3.7) / ICE_RING_WIDTH) ** 2)
        height = math.sqrt(settings.ice_ring / (settings.dose * pixel_size**2))
        out = out + height * torch.fft.irfft2(torch.fft.rfft2(torch.randn(h, w, generator=rng)) * ring, s=(h, w))
    return out
