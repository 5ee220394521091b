"""Particles of known 2D classes: a few pictures, turned, moved, seen through a CTF, under white noise. Made on the device that asks."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from frazil.data import Optics, Particles
from frazil.maths.ctf import ctf
from frazil.maths.fourier import image_from_ft
from frazil.maths.fourier2d import padded_planes
from frazil.maths.gridding import sinc2
from frazil.maths.rotation import euler_to_matrix
from frazil.ops.project import project

PAD = 2.0
SPOTS = 7  # Gaussians of a picture


def pictures(classes: int, box: int, generator: torch.Generator) -> Tensor:
    """(K, N, N) float32 pictures, each of some Gaussian spots within 0.3 N of the centre, standard deviation 1 inside that circle."""
    where = 0.22 * box * torch.randn(classes, SPOTS, 2, generator=generator).clamp(-1.2, 1.2)
    width = box * (0.03 + 0.05 * torch.rand(classes, SPOTS, generator=generator))
    height = 0.5 + torch.rand(classes, SPOTS, generator=generator)
    where = where - (where * height[..., None]).sum(1, keepdim=True) / height.sum(1)[:, None, None]  # mass in the middle
    line = torch.arange(box, dtype=torch.float32) - box // 2
    x, y = (torch.exp(-((line - where[..., i, None]) ** 2) / (2 * width[..., None] ** 2)) for i in (0, 1))
    out = torch.einsum("ks,ksy,ksx->kyx", height, y, x)
    inside = (line[:, None] ** 2 + line**2).sqrt() < 0.3 * box
    return out / out[:, inside].std(1)[:, None, None]


def particles_of(
    averages: Tensor, count: int, pixel_size: float, snr: float, shift: float, generator: torch.Generator, device: str = "cpu"
) -> tuple[Tensor, Particles, Tensor]:
    """(images (n, N, N) float32, particles with their true poses, class (n,)): equally many of each of `averages` (K, N, N).

    snr: variance of the picture inside 0.3 N over that of the noise, whose standard deviation is 1; shift: standard deviation, px.
    300 kV, defocus 0.8 to 2 µm. Poses, classes and noise come from the generator, in main memory, so the set is the same on any device.
    """
    n, optics = averages.shape[-1], Optics(pixel_size, averages.shape[-1])
    klass = torch.arange(count) % len(averages)
    psi = 360 * torch.rand(count, generator=generator, dtype=torch.float64)
    rotation = euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1))
    moved = shift * pixel_size * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    u = 8000 + 12000 * torch.rand(count, generator=generator, dtype=torch.float64)
    particles = Particles(
        optics=(optics,), group=torch.zeros(count, dtype=torch.int64), rotation=rotation, shift=-moved,
        defocus=torch.stack([u, u - 200, 0 * u], -1), half=torch.zeros(count, dtype=torch.int64),
        micrograph=torch.arange(count) // 100, micrographs=tuple(f"micrograph{i:04d}.mrc" for i in range((count + 99) // 100)),
    )  # fmt: skip
    planes = padded_planes((averages / sinc2(n, PAD, dims=2)).to(device), PAD, n // 2 - 1)
    ky, kx = torch.meshgrid(torch.fft.fftfreq(n, 1 / n), torch.arange(n // 2 + 1.0), indexing="ij")
    inside = torch.nonzero((kx**2 + ky**2 <= (n // 2 - 1) ** 2).reshape(-1))[:, 0]
    k = torch.stack([kx, ky], -1).reshape(-1, 2)[inside].to(device)
    images = torch.empty(count, n, n, device=device)
    for part in torch.arange(count).split(max(1, (1 << 24) // n**2)):
        slices = project(planes, rotation[part].to(device, torch.float32), k, PAD, which=klass[part].to(device))
        u, phase, b, scale = (getattr(particles, name)[part].to(device) for name in ("defocus", "phase_shift", "b_factor", "ctf_scale"))
        slices = slices * ctf(k.double() / (n * pixel_size), u, phase, b, scale, optics).float() * math.sqrt(snr)
        angle = -2 * math.pi * moved[part].to(device).float() @ (k.T / (n * pixel_size))
        ft = torch.zeros(len(part), n * (n // 2 + 1), dtype=torch.complex64, device=device)
        ft[:, inside.to(device)] = slices * torch.polar(torch.ones_like(angle), angle)
        images[part.to(device)] = image_from_ft(ft.reshape(-1, n, n // 2 + 1), n)
        images[part.to(device)] += torch.randn(len(part), n, n, generator=generator).to(device)
    return images, particles, klass


def agreement(found: Tensor, truth: Tensor) -> float:
    """Share of particles whose class (n,) is, for the true class that is most frequent among it, right: classes may be split, not mixed."""
    table = torch.zeros(int(found.max()) + 1, int(truth.max()) + 1, dtype=torch.int64)
    table.view(-1).index_add_(0, found * table.shape[1] + truth, torch.ones_like(found))
    return float(table.amax(1).sum()) / len(found)
