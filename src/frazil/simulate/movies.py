"""Movies with known motion: particles in ice under a beam that moves and damages them, as counts of a detector.

    frame_f = Poisson( dose·a²/gain · (1 + 2·[CTF · q_f · P_f]) ),   P_f = Σ_i λ·(projection of particle i) at x_i + m_f(x_i)

m_f(x): drift of the stage plus local motion, in px, zero in frame 0; alignment must find s = −m. q_f is the damage in the middle of a
frame.
Densities are scattering densities (the electron form factors of an atomic model, Å⁻²), so the contrast is that of the weak-phase
theory; `solvent` is the density of what the particle displaces, subtracted from its smoothed inside.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Volume
from frazil.maths.ctf import ctf, wavelength
from frazil.maths.dose import damage
from frazil.maths.fourier import image_ft
from frazil.maths.rotation import random_rotations
from frazil.simulate.particles import project_volume
from frazil.simulate.phantom import density, phantom

PROTEIN = 0.139  # Å⁻²: electron form factors of the atoms of β-galactosidase (PDB 5A1A) over its volume, 465 kDa at 0.81 Da/Å³

@dataclass(frozen=True)
class MovieSettings:
    """How a movie is made. Lengths in Å or px as named, exposure in e/Å²."""

    height: int = 2048  # px
    width: int = 2048
    frames: int = 24
    dose: float = 1.2  # e/Å² a frame
    drift_px: float = 8.0  # length of the stage's drift
    local_px: float = 1.5  # largest local motion within the field
    particles: int = 150
    defocus: tuple[float, float, float] = (18000.0, 17600.0, 30.0)  # u, v in Å, angle in degrees
    solvent_contrast: float = 0.8  # share of the low-resolution density that stands out of the ice
    ice: float = 0.0  # sd of the projected ice's contrast, white to 3 Å; it moves with the specimen
    gain_sd: float = 0.03  # relative spread of the pixels' sensitivity; 0: none
    hot_pixels: int = 20
    dead_pixels: int = 5
    seed: int = 1
    detector_seed: int = 1  # of gain and hot pixels: the same in all movies of a session
    damage: bool = True


@dataclass(frozen=True)
class SimulatedMovie:
    """A movie, made frame by frame, and everything that is true of it."""

    settings: MovieSettings
    optics: Optics
    track: Tensor  # (f, 2) float64 xy px: motion of the stage, zero in frame 0; alignment finds its negative
    stamps: Tensor  # (n, b, b) phase shift of each particle, centred
    place: Tensor  # (n, 2) xy px of the particles in frame 0
    gain: Tensor  # (H, W) float32, multiplicative: raw · gain is flat; 0 at dead pixels
    hot: Tensor  # (m, 2) int64 xy of the hot pixels
    transfer: Tensor  # (H, W//2+1) float32 CTF

    def motion(self, place: Tensor) -> Tensor:
        """(f, p, 2) true motion in px at places (p, 2), fractions xy of the field: what is at x in frame 0 is at x + motion in f."""
        return self.track[:, None] + local_motion(self.settings, place)

    def clean(self, frame: int) -> Tensor:
        """(H, W) float32 expected image of a frame, mean 1, before the detector."""
        s, a = self.settings, self.optics.pixel_size
        where = self.place + self.motion(self.place / torch.tensor([s.width, s.height]))[frame]
        field = paste(self.stamps, where, (s.height, s.width))
        ky, kx = torch.fft.fftfreq(s.height, a)[:, None], torch.fft.rfftfreq(s.width, a)[None, :]
        ft = torch.fft.rfft2(field)
        if s.ice > 0:
            ft = ft + self._ice_ft(frame, ky, kx)
        # Mean over the frame: damage goes on while it is exposed. The middle is that mean but for 1 % where little is left.
        exposure = s.dose * (frame + 0.5) if s.damage else 0.0
        left = damage((kx.square() + ky.square()).sqrt(), torch.tensor([exposure]), self.optics.voltage)[0]
        return 1 + 2 * torch.fft.irfft2(ft * self.transfer * left, s=(s.height, s.width))

    def counts(self, frame: int) -> Tensor:
        """(H, W) int64 electrons counted in a frame, on the detector: before its gain is corrected."""
        s = self.settings
        sensitivity = torch.where(self.gain > 0, 1 / self.gain.clamp(min=1e-6), 0.0)
        rate = s.dose * self.optics.pixel_size**2 * self.clean(frame).clamp(min=0) * sensitivity
        rng = torch.Generator().manual_seed(1000 * s.seed + frame)
        counts = torch.poisson(rate, generator=rng).long()
        if len(self.hot):
            x, y = self.hot.T
            counts[y, x] = torch.poisson(torch.full((len(x),), 15.0 + 5 * s.dose), generator=rng).long()
        return counts

    def _ice_ft(self, frame: int, ky: Tensor, kx: Tensor) -> Tensor:
        """Transform of the ice's phase shift in a frame; it moves with the stage."""
        s = self.settings
        white = torch.randn(s.height, s.width, generator=torch.Generator().manual_seed(s.seed + 77))
        dx, dy = (self.track[frame] * self.optics.pixel_size).tolist()
        keep = (kx.square() + ky.square()).sqrt() < 1 / 3
        return torch.fft.rfft2(s.ice * white) * keep * torch.exp(-2j * math.pi * (kx * dx + ky * dy))


def relativistic_mass(voltage: float) -> float:
    """γ = 1 + eV/mc² of an electron; voltage in kV. Scattering factors are tabled for electrons at rest, phases grow with it."""
    return 1 + voltage / 510.99895


def protein_density(box: int, pixel_size: float, seed: int = 1) -> Volume:
    """The density of a phantom in Å⁻², as dense where it is as the atoms of a protein are."""
    volume = density(phantom(box, pixel_size, seed=seed), box, pixel_size)
    inside = volume.data > 0.05 * volume.data.max()
    return replace(volume, data=volume.data * (PROTEIN * float(inside.sum()) / float(volume.data.sum())))


def drift_track(settings: MovieSettings) -> Tensor:
    """(f, 2) float64 px: a drift that slows down and bends, `drift_px` long from the first frame to the last."""
    rng = torch.Generator().manual_seed(settings.seed + 5)
    angle, bend = (torch.rand(2, generator=rng, dtype=torch.float64) * torch.tensor([360.0, 60.0]) + torch.tensor([0.0, 20.0])).tolist()
    t = torch.linspace(0, 1, settings.frames, dtype=torch.float64) if settings.frames > 1 else torch.zeros(1, dtype=torch.float64)
    length = 0.45 * t + 0.55 * (1 - torch.exp(-5 * t)) / (1 - math.exp(-5))
    direction = torch.deg2rad(angle + bend * t)
    steps = torch.stack([direction.cos(), direction.sin()], -1)[1:] * (length[1:] - length[:-1])[:, None]
    return settings.drift_px * torch.cat([torch.zeros(1, 2, dtype=torch.float64), steps.cumsum(0)])


def local_motion(settings: MovieSettings, place: Tensor) -> Tensor:
    """(f, p, 2) float64 px: doming of the ice, fast at first: a smooth field of `local_px` at most, not RELION's polynomial."""
    rng = torch.Generator().manual_seed(settings.seed + 9)
    c = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    t = torch.linspace(0, 1, settings.frames, dtype=torch.float64) if settings.frames > 1 else torch.zeros(1, dtype=torch.float64)
    course = torch.stack([(1 - torch.exp(-4 * t)) / (1 - math.exp(-4)), t**1.5], -1)

    def field(at: Tensor) -> Tensor:
        x, y = ((at.double() - 0.5) * 2).unbind(-1)
        shape = torch.stack([x, y, x * y, torch.sin(1.3 * x + 0.4) * torch.cos(1.1 * y), 0.5 * x * x - 0.5 * y * y], -1)
        return torch.stack([shape @ c.T, (shape.flip(-1)) @ c.flip(0).T * 0.5], 0)  # (2 courses, p, 2)

    line = torch.linspace(0, 1, 9, dtype=torch.float64)
    whole = field(torch.cartesian_prod(line, line))
    largest = torch.einsum("fc,cpd->fpd", course, whole - whole.mean(1, keepdim=True)).norm(dim=-1).max()
    return torch.einsum("fc,cpd->fpd", course, field(place) - whole.mean(1, keepdim=True)) * settings.local_px / largest.clamp(min=1e-9)


def simulate_movie(source: Volume, optics: Optics, settings: MovieSettings) -> SimulatedMovie:
    """A movie of particles of a scattering density (Å⁻², box even, pixel size that of the optics), frames made when asked for.

    Raises BadInput where the field cannot hold the particles or the pixel sizes differ.
    """
    if abs(source.pixel_size - optics.pixel_size) > 1e-3 * optics.pixel_size:
        raise BadInput(f"the density has pixels of {source.pixel_size:g} Å, the movie of {optics.pixel_size:g}; resample the map first")
    box = source.data.shape[-1]
    if settings.particles and min(settings.height, settings.width) <= box:
        raise BadInput(f"a field of {settings.width} x {settings.height} px holds no particles in boxes of {box} px")
    rng = torch.Generator().manual_seed(settings.seed)
    size = torch.tensor([settings.width, settings.height], dtype=torch.float64)
    place = _places(settings.particles, size, box, rng)
    rotation = random_rotations(max(settings.particles, 1), rng)[: settings.particles]
    item = replace(optics, box=box)
    scale = relativistic_mass(optics.voltage) * wavelength(optics.voltage) * optics.pixel_size  # radians of phase of one voxel: γ λ ρ a
    stamps = torch.empty(settings.particles, box, box)
    shells = torch.fft.fftfreq(box, optics.pixel_size)[:, None].square() + torch.fft.rfftfreq(box, optics.pixel_size).square()
    # Smooth protein against smooth ice: what remains of the contrast at low resolution; details keep theirs.
    match = 1 - (1 - settings.solvent_contrast) * torch.exp(-shells * 12.0**2)
    slices = project_volume(source, rotation, item) if settings.particles else torch.zeros(0, box, box // 2 + 1)
    for i, ft in enumerate(slices):
        stamps[i] = torch.fft.fftshift(torch.fft.irfft2(ft * match, s=(box, box))) * box**2 * scale
    rng = torch.Generator().manual_seed(settings.detector_seed)
    gain = torch.exp(settings.gain_sd * torch.randn(settings.height, settings.width, generator=rng))
    flat = torch.randperm(settings.height * settings.width, generator=rng)[: settings.hot_pixels + settings.dead_pixels]
    odd = torch.stack([flat % settings.width, flat // settings.width], -1)
    gain[odd[settings.hot_pixels :, 1], odd[settings.hot_pixels :, 0]] = 0
    transfer = _transfer(settings, optics)
    return SimulatedMovie(settings, optics, drift_track(settings), stamps, place, gain, odd[: settings.hot_pixels], transfer)


def _transfer(settings: MovieSettings, optics: Optics) -> Tensor:
    """(H, W//2+1) float32 CTF of the whole field."""
    a, one = optics.pixel_size, torch.ones(1, dtype=torch.float64)
    kx = torch.fft.rfftfreq(settings.width, a, dtype=torch.float64)
    defocus = torch.tensor([settings.defocus], dtype=torch.float64)
    out = []
    for ky in torch.fft.fftfreq(settings.height, a, dtype=torch.float64).split(64):
        k = torch.stack(torch.broadcast_tensors(kx, ky[:, None]), -1)
        out.append(ctf(k.reshape(-1, 2), defocus, 0 * one, 0 * one, one, optics).reshape(k.shape[:2]).float())
    return torch.cat(out)


def _places(n: int, size: Tensor, box: int, rng: torch.Generator) -> Tensor:
    """(n, 2) positions in px whose boxes lie inside the field, thrown so that they keep 0.6 of a box apart where there is room."""
    out = torch.empty(0, 2, dtype=torch.float64)
    for attempt in range(200):
        trial = box / 2 + (size - box) * torch.rand(1 + n // 2, 2, generator=rng, dtype=torch.float64)
        for point in trial:
            if attempt > 100 or not len(out) or float((out - point).norm(dim=-1).min()) > 0.6 * box:
                out = torch.cat([out, point[None]])
            if len(out) >= n:
                return out[:n]
    return out[:n]


def paste(stamps: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """(H, W) sum of stamps (n, b, b) with their middles at places (n, 2) xy px, between pixels by a shift of their transforms."""
    box = stamps.shape[-1]
    field = torch.zeros(shape)
    whole = place.round()
    rest = (place - whole) / box
    ky, kx = torch.fft.fftfreq(box, 1 / box)[:, None], torch.arange(box // 2 + 1)[None, :]
    for index in torch.arange(len(stamps)).split(32):
        phase = -2 * math.pi * (kx * rest[index, 0, None, None] + ky * rest[index, 1, None, None])
        ft = torch.fft.rfft2(stamps[index]) * torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
        for i, stamp in zip(index.tolist(), torch.fft.irfft2(ft, s=(box, box)), strict=True):
            x, y = (int(v) - box // 2 for v in whole[i])
            into = slice(max(y, 0), min(y + box, shape[0])), slice(max(x, 0), min(x + box, shape[1]))
            field[into] += stamp[into[0].start - y : into[0].stop - y, into[1].start - x : into[1].stop - x]
    return field


def structure_spectrum(movie: SimulatedMovie) -> Tensor:
    """(b, b//2+1) mean |transform|² of the particles' phase shifts: what the contrast of a simulated movie rests on."""
    return image_ft(movie.stamps).abs().square().mean(0)
