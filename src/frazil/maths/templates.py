"""Templates for picking: background taken off, masked, turned in the plane, sampled on a work grid (spec/processing 4.5).

A picture of psi is A_psi(x, y) = A(x cos psi − y sin psi, x sin psi + y cos psi), x and y from the centre: rlnAnglePsi's sense.
The template is first resampled in Fourier space to half a work pixel or finer, so that cubic interpolation of it errs by about 1e-3.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from frazil.maths.fourier import fourier_resample
from frazil.maths.masks import radii, soft_edge

FINER = 2.0  # samples of the interpolated template a work pixel
EDGE = 0.12  # width of the mask's soft edge, of its radius


def mask_templates(images: Tensor, pixel_size: float, diameter: float) -> Tensor:
    """(t, N, N) templates less their mean outside `diameter` (Å), times a soft circular mask that ends at the diameter.

    The mean is over the circle's outside within the box, or over its outermost pixels where the circle fills the box.
    """
    n = images.shape[-1]
    r = radii(n, 2, images.device, images.dtype)
    radius = min(0.5 * diameter / pixel_size, n / 2)
    outside = (r > radius) & (r <= max(n / 2, radius + 1)) if radius < n / 2 - 1 else r > n / 2 - 1
    level = images[:, outside].mean(-1)[:, None, None]
    edge = max(2.0, EDGE * radius)
    return (images - level) * soft_edge(r, max(radius - edge, 1.0), edge)


def lowpass_templates(images: Tensor, pixel_size: float, finest: float) -> Tensor:
    """(t, N, N) without what is finer than `finest` Å: sampled on a coarser grid it would come back as coarse detail that is not there."""
    n = images.shape[-1]
    k2 = torch.fft.fftfreq(n, pixel_size, device=images.device).square()[:, None] + torch.fft.rfftfreq(n, pixel_size).to(images).square()
    return torch.fft.irfft2(torch.fft.rfft2(images) * (k2 <= finest**-2), s=(n, n))


def turned_templates(images: Tensor, pixel_size: float, work_pixel: float, psi: Tensor, reach: int) -> Tensor:
    """(t, r, 2h+1, 2h+1): templates (t, N, N) turned by psi (r,) degrees, on work pixels, centre in the middle, h = `reach`.

    Values keep their scale. `images` must be 0 beyond the reach (mask_templates).
    """
    n = images.shape[-1]
    fine = max(2 * math.ceil(n * pixel_size * FINER / work_pixel / 2), 4)
    samples = fourier_resample(images, fine, dims=2)
    fine_pixel = n * pixel_size / fine
    line = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype) * (work_pixel / fine_pixel)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = torch.deg2rad(psi.to(images))[:, None, None]
    u = x * angle.cos() - y * angle.sin() + fine // 2
    v = x * angle.sin() + y * angle.cos() + fine // 2
    grid = torch.stack([u, v], -1) * (2 / (fine - 1)) - 1  # grid_sample's own units: −1 and 1 are the centres of the first and last pixel
    t, r, side = len(images), len(psi), 2 * reach + 1
    picture = samples[:, None].expand(t, 1, fine, fine)
    flat = grid.reshape(1, r * side, side, 2).expand(t, -1, -1, -1)
    turned = torch.nn.functional.grid_sample(picture, flat, mode="bicubic", padding_mode="zeros", align_corners=True)
    return turned.reshape(t, r, side, side)


def template_reach(diameter: float, work_pixel: float) -> int:
    """Work pixels from the centre of a template to the last one that may differ from 0 (masked to `diameter`, Å, ringing included)."""
    return math.ceil(0.5 * diameter / work_pixel) + 2


def is_round(kernels: Tensor, tolerance: float = 0.02) -> bool:
    """Whether all in-plane angles r of (r, h, w) show the same picture, to `tolerance` of its norm."""
    norm = kernels[0].norm()
    return bool(((kernels - kernels[:1]).flatten(1).norm(dim=-1) <= tolerance * norm).all())


def kernel_disc(reach: int, diameter_px: float, like: Tensor) -> Tensor:
    """(2h+1, 2h+1) the particle's disc, one pixel soft."""
    line = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype)
    return soft_edge((line[:, None].square() + line.square()).sqrt(), 0.5 * diameter_px - 0.5, 1.0)


def standardised(kernels: Tensor, disc: Tensor) -> Tensor:
    """disc · (A − mean) / sqrt(Σ disc (A − mean)²): its product with an image is the coefficient times the image's own root sum."""
    mean = (kernels * disc).sum((-2, -1), keepdim=True) / disc.sum()
    centred = kernels - mean
    return centred * disc / (disc * centred.square()).sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
