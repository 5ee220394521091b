"""Projections of a map: central slices of its transform, back in real space (spec/refinement 1.1-1.5).

    image = FT⁻¹[ c(k) · V(P·Rᵀ·(kx, ky, 0)) · exp(+2πi k·o) ],    V the transform of map / sinc², padded P times

A pixel is the sum of the density along the ray, in voxels of the map. With the optics and poses of a particle the picture is
what the particle image should show.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from frazil.data import Particles, Volume
from frazil.maths.ctf import odd_phase
from frazil.maths.fourier import PixelList, image_from_ft, padded_ft
from frazil.maths.gridding import sinc2
from frazil.ops.project import project
from frazil.refine.windows import Engine, make_frame, particle_ctf

PAD = 2.0


def prepare_map(volume: Volume, device: str = "cpu") -> Tensor:
    """Half volume (see maths.fourier) of a map, ready for `project_particles`."""
    box = volume.data.shape[-1]
    data = volume.data.to(device=device, dtype=torch.float32)
    return padded_ft(data / sinc2(box, PAD, device=device, dtype=torch.float32), PAD, box // 2)


def image_from_pixels(values: Tensor, pixels: PixelList, inside: int) -> Tensor:
    """(b, N, N) real images of (b, inside) transform values at the leading pixels of a list; other frequencies are 0."""
    n = pixels.box
    ft = values.new_zeros(len(values), n, n // 2 + 1)
    ft.reshape(len(values), -1)[:, pixels.index[:inside]] = values
    # The list holds kx = 0 for ky ≥ 0 only; its conjugate mates complete the column.
    ft[:, n // 2 + 1 :, 0] = ft[:, 1 : n // 2, 0].flip(1).conj()
    return image_from_ft(ft, n)


def project_particles(
    half: Tensor, pixel_size: float, particles: Particles, index: Tensor, *, ctf: bool = False, shifts: bool = True
) -> Tensor:
    """(b, N, N) float32 projections at the poses of the particles at `index` (b,), all of one optics group, on the half volume's device.

    half: `prepare_map` of a map of pixel size `pixel_size` in Å. ctf: multiply by the particle's CTF and aberrations; shifts:
    displace the picture as the particle is displaced in its image.
    """
    optics = particles.optics[int(particles.group[index[0]])]
    box = round((half.shape[-1] - 2) / PAD) * 2
    engine = Engine(diameter=0.0, pad=PAD, device=str(half.device))
    frame = make_frame(optics, box, box, pixel_size, engine)
    rotations = particles.rotation[index].to(device=half.device, dtype=torch.float32)
    values = project(half, rotations, frame.coords, PAD) * frame.amplitude
    turn = 2 * math.pi * (particles.shift[index].to(frame.k) @ frame.k.T) if shifts else torch.zeros(1, 1).to(frame.k)
    if ctf:
        turn = turn + odd_phase(frame.k, optics)
        values = values * particle_ctf(particles, index, frame.k, optics, engine)
    values = values * torch.polar(torch.ones_like(turn), turn).to(values.dtype)
    return image_from_pixels(values, frame.pixels, frame.inside)
