"""What the comparisons with RELION 5.0.1's iterations share (../shared/data/parity_relion5): the set, and how far two results are apart."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.maths.fourier import map_from_half_volume, shell_round
from frazil.maths.fourier2d import hermitian_planes, images_from_planes
from frazil.maths.gridding import sinc2
from frazil.maths.masks import mask_images, mask_volume
from frazil.refine import maximization as m_step
from frazil.refine.planes import flatten_planes

BOX, PIXEL, DIAMETER, PAD = 64, 3.54, 200.0, 2.0


def worst(ours: Tensor, theirs: Tensor, shells: slice) -> float:
    """Largest relative difference over shells."""
    a, b = ours.reshape(-1)[shells], theirs.reshape(-1)[shells]
    return float(((a - b) / b).abs().max())


def map_fsc(a: Tensor, b: Tensor) -> Tensor:
    """(N/2+1,) correlation of two maps a shell."""
    k = torch.fft.fftfreq(BOX, 1 / BOX, dtype=torch.float64)
    shell = shell_round((k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2).sqrt()).long().flatten()
    fa, fb = (torch.fft.fftn(x.double()).flatten() for x in (a, b))
    cross, aa, bb = (torch.bincount(shell, v) for v in ((fa * fb.conj()).real, fa.abs().square(), fb.abs().square()))
    return (cross / (aa * bb).sqrt())[: BOX // 2 + 1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def relion_map(data: Tensor, weight: Tensor, tau2: Tensor) -> Tensor:
    """(N, N, N) masked map of prepared sums with T·τ² (N/2+1,), divided with RELION's edge.

    Voxels with |p| = P·r_max exactly get no prior; their weight is at least a thousandth of the mean of the shell before, which is the
    last that RELION averages.
    """
    m = data.shape[-1] - 1
    line = torch.arange(-m, m + 1, dtype=torch.float64)
    square = line[:, None, None] ** 2 + line[None, :, None] ** 2 + line[m:] ** 2
    inner, radius = square < (m - 1) ** 2, square.sqrt() / PAD
    prior = 1 / (PAD**3 * tau2[shell_round(radius).long().clamp(max=BOX // 2)].clamp(min=1e-30))
    full = weight + torch.where(inner & (radius >= 4.5), prior, 0)
    shell = radius.long().clamp(max=int((m - 1) / PAD) - 1)
    mean = torch.bincount(shell[inner], full[inner]) / torch.bincount(shell[inner])
    full = torch.maximum(full, mean[shell] / 1000)
    volume = torch.where((square <= (m - 1) ** 2) & (full > 0), data / full.clamp(min=1e-300), 0)
    density = mask_volume(map_from_half_volume(volume, PAD, BOX), BOX / 2, m_step.EDGE_PX)
    return m_step.flatten_solvent(density / sinc2(BOX, PAD, dtype=torch.float64), PIXEL, DIAMETER, 5.0, None)


def relion_averages(data: Tensor, weight: Tensor, tau2: Tensor) -> Tensor:
    """(K, N, N) masked class averages of half planes of sums with T·τ² (K, N/2+1), divided with RELION's edge: as `relion_map`."""
    m = data.shape[-1] - 1
    line = torch.arange(-m, m + 1, dtype=torch.float64)
    square = line[:, None] ** 2 + line[m:] ** 2
    inner, radius = square < (m - 1) ** 2, square.sqrt() / PAD
    prior = 1 / (PAD**2 * tau2[:, shell_round(radius).long().clamp(max=BOX // 2)].clamp(min=1e-30))
    full = hermitian_planes(weight) + torch.where(inner & (radius >= 4.5), prior, 0)
    shell = radius.long().clamp(max=int((m - 1) / PAD) - 1)
    mean = torch.stack([torch.bincount(shell[inner], f[inner]) for f in full]) / torch.bincount(shell[inner])
    full = torch.maximum(full, mean[:, shell] / 1000)
    ft = torch.where((square <= (m - 1) ** 2) & (full > 0), hermitian_planes(data) / full.clamp(min=1e-300), 0)
    maps = mask_images(images_from_planes(ft, PAD, BOX), BOX / 2, m_step.EDGE_PX)
    return flatten_planes(maps / sinc2(BOX, PAD, dtype=torch.float64, dims=2), PIXEL, DIAMETER, 5.0, None)
