"""Many particles of several related structures, made on the device that will compute with them: for classification and bench/.

A phantom of which each class but the first lacks one of its outer domains (or two), as a factor that is bound to some particles only.
Projections by the engine's own slices of the sampled density.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles, Volume
from frazil.maths.ctf import ctf
from frazil.maths.fourier import PixelList, image_from_ft, padded_ft, pixel_list
from frazil.maths.gridding import sinc2
from frazil.ops.project import project
from frazil.simulate.particles import Settings, draw_particles
from frazil.simulate.phantom import Phantom, density, phantom

BATCH = 1 << 24  # pixels made at a time
PAD = 2.0


@dataclass(frozen=True)
class ClassSet:
    """Images of several structures and what is true of them."""

    images: Tensor  # (n, N, N), on the device
    particles: Particles  # with true rotation, shift, defocus and class (klass, from 1)
    maps: tuple[Volume, ...]  # of the classes, on the grey scale of the images, in main memory


DOMAINS = 6  # of a phantom without symmetry; the last blobs of one are their bulks, the first the core


def variants(whole: Phantom, classes: int) -> list[Phantom]:
    """The phantom (C1), and classes − 1 copies that lack one outer domain each (2 to 18 % of the mass), then two, then three …"""
    centre, size = whole.centre[-DOMAINS:], whole.sigma[-DOMAINS:]
    owner = (torch.cdist(whole.centre, centre) / size).argmin(1)
    outer = range(1, DOMAINS)
    lacking = [set(some) for count in range(DOMAINS) for some in combinations(outer, count)][:classes]
    if len(lacking) < classes:
        raise BadInput(f"{classes} classes: the phantom has {DOMAINS - 1} outer domains, so at most {2 ** (DOMAINS - 1)}")
    out = []
    for gone in lacking:
        keep = torch.tensor([int(o) not in gone for o in owner])
        out.append(replace(whole, centre=whole.centre[keep], sigma=whole.sigma[keep], mass=whole.mass[keep]))
    return out


def simulate_classes(
    n: int, optics: Optics, classes: int, settings: Settings | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClassSet:
    """n particles, classes in turn. `settings.snr` is that of the mean noiseless image over the whole box; the noise has variance 1.

    images come in `dtype` (float16 holds them well: they are of the order of 1) on `device`.
    """
    settings = settings or Settings()
    box, a = optics.box, optics.pixel_size
    particles, _ = draw_particles(n, (optics,), settings, torch.Generator().manual_seed(settings.seed))
    particles = replace(particles, klass=torch.arange(n) % classes + 1)
    shapes = variants(phantom(box, a, "C1", settings.seed), classes)
    maps = [density(shape, box, a, device) for shape in shapes]
    pixels = pixel_list(box, box, device)
    noise = torch.Generator(device).manual_seed(settings.seed + 1)
    out, factor = torch.empty(n, box, box, dtype=dtype, device=device), 0.0
    for k, volume in enumerate(maps):
        half = padded_ft(volume.data.to(device) / sinc2(box, PAD, device=device), PAD, box // 2)
        for index in torch.nonzero(particles.klass == k + 1)[:, 0].split(max(1, BATCH // box**2)):
            signal = _clean(half, particles, index, pixels)
            factor = factor or math.sqrt(settings.snr / float(signal.var(dim=(1, 2)).mean()))
            image = factor * signal + torch.randn(signal.shape, generator=noise, device=device)
            out[index.to(device)] = image.to(dtype)
    return ClassSet(out, particles, tuple(Volume(v.data.cpu() * factor, a) for v in maps))


def _clean(half: Tensor, particles: Particles, index: Tensor, pixels: PixelList) -> Tensor:
    """(b, N, N) noiseless images: slices with CTF, displaced by −shift."""
    box, optics, inside = pixels.box, particles.optics[0], pixels.inside
    coords = pixels.k()[:inside]
    k = coords / (box * optics.pixel_size)
    slices = project(half, particles.rotation[index].to(half.device, torch.float32), coords.float(), PAD)
    at = [getattr(particles, name)[index].to(half.device) for name in ("defocus", "phase_shift", "b_factor", "ctf_scale")]
    angle = 2 * math.pi * particles.shift[index].to(k) @ k.T
    slices *= torch.polar(ctf(k, at[0], at[1], at[2], at[3], optics), angle).to(slices)
    ft = slices.new_zeros(len(index), box, box // 2 + 1)
    ft.view(len(index), -1)[:, pixels.index[:inside]] = slices
    ft[:, box // 2 + 1 :, 0] = ft[:, 1 : box // 2, 0].conj().flip(1)  # the list holds kx = 0 for ky ≥ 0 only
    return image_from_ft(ft, box)
