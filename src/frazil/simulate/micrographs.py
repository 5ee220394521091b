"""Micrographs with known positions: particles, CTF, noise, ice blobs, junk, a carbon edge (spec/processing 4.13).

    micrograph = − IFT[ c(k) FT[ Σ_i P_i(r − r_i) ] ] + noise + contamination

P_i are projections in random orientations at distances of at least a particle's diameter. SNR: variance of the projections, with the CTF
of the middle defocus, under the particle's disc over that of the noise in a pixel, which is 1. Particles are dark, as in a real micrograph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.data import Optics, Volume
from frazil.maths.ctf import ctf
from frazil.maths.fourier import image_from_ft
from frazil.maths.masks import radii
from frazil.maths.rotation import euler_to_matrix, random_rotations
from frazil.simulate.particles import project_volume
from frazil.simulate.phantom import Phantom, project_phantom

DEFOCUS = (9000.0, 21000.0)  # Å, range of the mean defocus
KNEE = 0.15  # cycles per px at which coloured noise has fallen to half its amplitude
ROWS = 256  # of the transform multiplied by the CTF at a time


@dataclass(frozen=True)
class MicrographSettings:
    """How micrographs are made. Lengths in Å."""

    shape: tuple[int, int] = (1024, 1024)  # px (y, x)
    diameter: float = 150.0  # of the particle
    particles: int = 100  # a micrograph, at most: fewer where no room is left
    snr: float = 0.1
    views: int = 0  # distinct orientations of the whole set; 0: each particle its own
    in_plane: bool = True  # with views: turned at random in the plane too
    edge: float = 0.6  # least distance of centres from the edge and from carbon, of the diameter
    coloured: float = 0.2  # share of the noise's variance that falls off with frequency, as behind thick ice
    junk: int = 8  # blobs half or twice as large as the particle
    ice: int = 2  # ice crystals: dark, one and a half to three times as large
    carbon: bool = True  # a carbon edge in one corner
    seed: int = 1
    b_factor: float = 400.0  # Å², of the images: motion, damage, detector


@dataclass(frozen=True)
class SimulatedMicrograph:
    """A micrograph and the truth about it."""

    image: Tensor  # (y, x) float32
    xy: Tensor  # (n, 2) float64 px, centres
    view: Tensor  # (n,) int64, orientation of each
    psi: Tensor  # (n,) float64 degrees, turn in the plane relative to that view
    defocus: Tensor  # (3,) u, v in Å, angle in degrees


def view_rotations(settings: MicrographSettings) -> Tensor:
    """(views, 3, 3) orientations that a set of micrographs shares."""
    return random_rotations(max(1, settings.views), torch.Generator().manual_seed(settings.seed))


def simulate_micrograph(source: Phantom | Volume, optics: Optics, settings: MicrographSettings, number: int) -> SimulatedMicrograph:
    """Micrograph `number` of a set: the same settings and number give the same pixels. optics.box: side of a particle's box, px."""
    rng = torch.Generator().manual_seed(settings.seed * 100003 + number)
    h, w = settings.shape
    carbon = _carbon_side(settings, rng) if settings.carbon else torch.full((h, w), -1e9)
    crystals = _crystals(settings, optics, rng)
    inside = [radius - _distance(h, w, x, y) for x, y, radius in crystals]
    xy = _places(settings, optics, torch.stack([carbon, *inside]).amax(0), rng)
    n = len(xy)
    if settings.views:
        view = torch.randint(settings.views, (n,), generator=rng)
        psi = 360 * torch.rand(n, generator=rng, dtype=torch.float64) if settings.in_plane else torch.zeros(n, dtype=torch.float64)
        turn = euler_to_matrix(torch.stack([torch.zeros_like(psi), torch.zeros_like(psi), psi], -1))
        rotation = turn @ view_rotations(settings)[view]
    else:
        view, psi, rotation = torch.arange(n), torch.zeros(n, dtype=torch.float64), random_rotations(n, rng)
    canvas = _pasted(source, rotation, xy, optics, settings)
    mean, angle = torch.rand(2, generator=rng).tolist()
    underfocus = DEFOCUS[0] + (DEFOCUS[1] - DEFOCUS[0]) * mean
    defocus = torch.tensor([underfocus + 100, underfocus - 100, 180 * angle])
    signal = multiply_ctf(canvas, optics, defocus, settings.b_factor)
    image = _noise(settings, rng) - grey_scale(source, optics, settings) * signal
    _contaminate_(image, carbon, crystals, settings, optics, rng)
    return SimulatedMicrograph(image, xy, view, psi, defocus)


def slices(source: Phantom | Volume, rotation: Tensor, optics: Optics) -> Tensor:
    """(n, N, N//2+1) transforms of projections of a phantom or a map."""
    return project_phantom(source, rotation, optics) if isinstance(source, Phantom) else project_volume(source, rotation, optics)


def grey_scale(source: Phantom | Volume, optics: Optics, settings: MicrographSettings) -> float:
    """Factor that gives the projections the SNR asked for: found from twelve views, the same for a whole set."""
    rotation = view_rotations(settings)[:12] if settings.views else random_rotations(12, torch.Generator().manual_seed(settings.seed))
    images = image_from_ft(slices(source, rotation, optics), optics.box)
    middle = torch.tensor([sum(DEFOCUS) / 2, sum(DEFOCUS) / 2, 0.0])
    images = torch.stack([multiply_ctf(image, optics, middle, settings.b_factor) for image in images])
    under = radii(optics.box, 2) <= 0.5 * settings.diameter / optics.pixel_size
    return math.sqrt(settings.snr / max(float(images[:, under].var(-1).mean()), 1e-30))


def multiply_ctf(image: Tensor, optics: Optics, defocus: Tensor, b_factor: float = 0.0) -> Tensor:
    """(y, x) image times the CTF, damped by a B-factor in Å²; it wraps round the edges."""
    h, w = image.shape
    ft = torch.fft.rfft2(image)
    kx = torch.fft.rfftfreq(w, optics.pixel_size, dtype=torch.float64)
    ky = torch.fft.fftfreq(h, optics.pixel_size, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for start in range(0, h, ROWS):
        part = ky[start : start + ROWS]
        k = torch.stack(torch.broadcast_tensors(kx[None, :], part[:, None]), -1).reshape(-1, 2)
        ft[start : start + ROWS] *= ctf(k, defocus[None].double(), 0 * one, b_factor * one, one, optics, dtype=torch.float32)[0].reshape(
            len(part), -1
        )
    return torch.fft.irfft2(ft, s=(h, w))


def _places(settings: MicrographSettings, optics: Optics, blocked: Tensor, rng: torch.Generator) -> Tensor:
    """(n, 2) centres, at least a diameter apart, off the edge, the carbon and the ice (`blocked` > 0: on them, in px)."""
    h, w = settings.shape
    apart, border = settings.diameter / optics.pixel_size, settings.edge * settings.diameter / optics.pixel_size
    room = torch.tensor([w - 1 - 2 * border, h - 1 - 2 * border], dtype=torch.float64)
    out = torch.empty(0, 2, dtype=torch.float64)
    for _ in range(60 * settings.particles):
        if len(out) >= settings.particles or bool((room <= 0).any()):
            break
        place = border + room * torch.rand(2, generator=rng, dtype=torch.float64)
        if blocked[int(place[1]), int(place[0])] > -border or (len(out) and float((out - place).norm(dim=-1).min()) < apart):
            continue
        out = torch.cat([out, place[None]])
    return out


def _pasted(source: Phantom | Volume, rotation: Tensor, xy: Tensor, optics: Optics, settings: MicrographSettings) -> Tensor:
    """(y, x) sum of the projections at their places, fractions of a pixel by a phase."""
    h, w = settings.shape
    n = optics.box
    canvas = torch.zeros(h + 2 * n, w + 2 * n)
    k = torch.stack(
        torch.broadcast_tensors(torch.fft.rfftfreq(n, dtype=torch.float64)[None, :], torch.fft.fftfreq(n, dtype=torch.float64)[:, None]), -1
    )
    for part in torch.arange(len(xy)).split(64) if len(xy) else ():
        ft = (
            project_phantom(source, rotation[part], optics)
            if isinstance(source, Phantom)
            else project_volume(source, rotation[part], optics)
        )
        whole = xy[part].round()
        shift = 2 * math.pi * torch.einsum("yxi,ni->nyx", k, xy[part] - whole)
        moved = ft * torch.polar(torch.ones_like(shift), -shift).to(ft.dtype)
        images = torch.fft.fftshift(torch.fft.irfft2(moved, s=(n, n)), dim=(-2, -1)) * n**2
        for image, (x, y) in zip(images, whole.long().tolist(), strict=True):
            canvas[y + n - n // 2 : y + 2 * n - n // 2, x + n - n // 2 : x + 2 * n - n // 2] += image
    return canvas[n : n + h, n : n + w].clone()


def _noise(settings: MicrographSettings, rng: torch.Generator) -> Tensor:
    """(y, x) noise of variance 1, white and falling off."""
    h, w = settings.shape
    white = torch.randn(h, w, generator=rng)
    if settings.coloured <= 0:
        return white
    k2 = torch.fft.fftfreq(h).square()[:, None] + torch.fft.rfftfreq(w).square()
    smooth = torch.fft.irfft2(torch.fft.rfft2(torch.randn(h, w, generator=rng)) / (1 + k2 / KNEE**2), s=(h, w))
    return math.sqrt(1 - settings.coloured) * white + math.sqrt(settings.coloured) * smooth / smooth.std()


def _distance(h: int, w: int, x: float, y: float) -> Tensor:
    """(y, x) px from a place."""
    return ((torch.arange(h)[:, None] - y) ** 2 + (torch.arange(w) - x) ** 2).sqrt()


def _carbon_side(settings: MicrographSettings, rng: torch.Generator) -> Tensor:
    """(y, x) px behind the edge of the carbon (> 0: on it)."""
    h, w = settings.shape
    angle = 2 * math.pi * float(torch.rand(1, generator=rng))
    y, x = torch.meshgrid(torch.arange(h) - h / 2, torch.arange(w) - w / 2, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    return along - 0.38 * min(h, w) - 0.04 * min(h, w) * float(torch.rand(1, generator=rng))


def _crystals(settings: MicrographSettings, optics: Optics, rng: torch.Generator) -> list[tuple[float, float, float]]:
    """x, y, radius in px of the ice crystals."""
    h, w = settings.shape
    draws = torch.rand(settings.ice, 3, generator=rng).tolist()
    return [(x * w, y * h, settings.diameter * (0.75 + 0.75 * size) / optics.pixel_size) for x, y, size in draws]


def _contaminate_(
    image: Tensor, carbon: Tensor, crystals: list[tuple[float, float, float]], settings: MicrographSettings, optics: Optics,
    rng: torch.Generator,
) -> None:  # fmt: skip
    """Add carbon, ice crystals and junk to a micrograph; junk keeps off nothing."""
    h, w = image.shape
    if settings.carbon:
        texture = _noise(settings, rng)
        on = torch.sigmoid(carbon / 3)
        rim = torch.exp(-0.5 * (carbon / (0.1 * settings.diameter / optics.pixel_size)) ** 2)
        image += on * (0.9 * texture - 0.8) - 1.2 * rim
    for x, y, radius in crystals:
        image -= 3.0 * torch.sigmoid((radius - _distance(h, w, x, y)) / max(1.0, 0.08 * radius))
    for number in range(settings.junk):
        x, y = (torch.rand(2, generator=rng) * torch.tensor([w, h])).tolist()
        radius = settings.diameter * (0.2 if number % 2 else 0.95) / optics.pixel_size
        image -= 1.5 * math.sqrt(settings.snr) * torch.sigmoid((radius - _distance(h, w, x, y)) / max(1.0, 0.08 * radius))
