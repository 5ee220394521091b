"""Particles cut out of micrographs (spec/processing 5).

A particle at (x, y) px gets the box whose pixel N/2 is the pixel c = round(x, y), the first of which is c − N/2; what rounding leaves
is kept as its shift,

    o = (c − (x, y)) · pixel size,        so that the particle is at c − o / pixel size (RELION's rlnCoordinate and rlnOrigin)

Then in this order: Fourier crop to a smaller box n (pixel size · N/n, values keep their mean), dust replaced by noise, a plane through the
background subtracted, background brought to mean 0 and sd 1, contrast inverted. Places of refined particles:

    (x, y) = coordinate − o / pixel size + (A c)_xy / pixel size     A: rotation of the particle, c: new centre in the map, Å
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.fourier import shell_round
from frazil.maths.peaks import highest_apart
from frazil.maths.tiling import good_size
from frazil.ops.boxes import cut, level_
from frazil.ops.boxes.reference import background

BATCH_PIXELS = {"cpu": 1 << 24, "cuda": 1 << 26}  # of the boxes in work at a time
BACKGROUND = 0.75  # of the box: default diameter of the circle outside which is background
GENEROUS = 1.5  # box over diameter


@dataclass(frozen=True)
class ExtractSettings:
    """How particles are cut. Lengths in px."""

    box: int  # N, px of the micrograph
    size: int  # n ≤ N, px of the image written
    background: float  # diameter of the circle outside which is background, px of the micrograph
    normalise: bool = True
    ramp: bool = True
    invert: bool = True
    white: float = -1.0  # sd above the background from which a pixel is dust; ≤ 0: none is
    black: float = -1.0  # the same below


@dataclass(frozen=True)
class Placed:
    """Boxes of particles in a micrograph."""

    centre: Tensor  # (n, 2) int64 px, x and y of the pixel that becomes N/2
    residual: Tensor  # (n, 2) float64 px, centre − true place: the particle's shift
    outside: Tensor  # (n,) share of the box that is outside the micrograph


def place(xy: Tensor, shape: tuple[int, int], box: int) -> Placed:
    """Boxes for particles at xy (n, 2) px of a micrograph of `shape` (y, x); halves round away from zero."""
    centre = shell_round(xy.double()).long()
    first = centre - box // 2
    size = torch.tensor([shape[1], shape[0]], device=xy.device)
    inside = (torch.minimum(first + box, size) - first.clamp(min=0)).clamp(min=0).double() / box
    return Placed(centre, centre - xy.double(), 1 - inside.prod(-1))


def refined_places(coordinate: Tensor, shift: Tensor, rotation: Tensor, pixel_size: float, point: Tensor | None = None) -> Tensor:
    """(n, 2) px where refined particles are, or where a point of the map (Å, xyz from the centre of its box) lies in them.

    coordinate (n, 2) px, shift (n, 2) Å, rotation (n, 3, 3), pixel_size of the micrograph in Å.
    """
    place = coordinate.double() - shift.double() / pixel_size
    return place if point is None else place + (rotation.double() @ point.double())[:, :2] / pixel_size


def first_of_each(xy: Tensor, quality: Tensor, distance: float) -> Tensor:
    """(m,) int64, ascending: particles of a micrograph left when of those within `distance` only the best stays (KD-tree)."""
    kept = highest_apart(xy.double().numpy(), quality.double().numpy(), distance)
    return torch.from_numpy(kept).sort().values


def extract(
    micrograph: Tensor, centre: Tensor, settings: ExtractSettings, generator: torch.Generator | None = None,
    ctf: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(index (b,) int64, images (b, n, n), background (b, 2) mean and sd before normalising) of one batch of particles after another.

    micrograph (H, W) float32 or float64 on any device; centre (n, 2) int64 as of `place`. A particle whose background has no spread, or
    that holds values that are not finite, has sd 0 or NaN: leave it out. ctf: gives (b, N, N//2+1) factors of particles at an index,
    by which the boxes are multiplied first (premultiplied images). Without `normalise`, mean and sd are of the image as written.
    """
    device, scale = micrograph.device, settings.size / settings.box
    batch = max(1, BATCH_PIXELS.get(device.type, 1 << 24) // settings.box**2)
    radius = 0.5 * settings.background * scale
    for index in torch.arange(len(centre)).split(batch):
        images = cut(micrograph, centre[index].to(device) - settings.box // 2, settings.box)
        if ctf is not None:
            images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf(index).to(images), s=images.shape[-2:])
        if settings.size < settings.box:
            images = fourier_crop(images, settings.size)
        if settings.white > 0 or settings.black > 0:
            replace_dust_(images, radius, settings.white, settings.black, generator)
        sign = -1.0 if settings.invert else 1.0
        if settings.normalise:
            found = level_(images, radius, sign, ramp=settings.ramp)
        else:
            found = torch.stack([images.double().mean((1, 2)), images.double().std((1, 2), correction=0)], -1)
            images = sign * images
        yield index, images, found.cpu()


def fourier_crop(images: Tensor, size: int) -> Tensor:
    """(b, n, n) images of half as many (or fewer) pixels, or any even n < N: the transform up to, without, the new Nyquist frequency.

    Pixel N/2 goes to pixel n/2 exactly; the mean stays.
    """
    box, half = images.shape[-1], size // 2
    ft = torch.fft.rfft2(images)
    out = ft.new_zeros(*images.shape[:-2], size, half + 1)
    out[..., :half, :half] = ft[..., :half, :half]
    out[..., half + 1 :, :half] = ft[..., box - half + 1 :, :half]
    return torch.fft.irfft2(out, s=(size, size)) * (size / box) ** 2


def replace_dust_(images: Tensor, radius: float, white: float, black: float, generator: torch.Generator | None) -> None:
    """Pixels farther than `white` (`black`) sd above (below) the background's mean become draws of the background, in place."""
    outside = background(images.shape[-1], radius, images.device)[1]
    values = images[:, outside].double()
    mean, sd = (v[:, None, None].to(images.dtype) for v in (values.mean(1), values.std(1, correction=0)))
    z = (images - mean) / sd
    dust = torch.zeros_like(z, dtype=torch.bool)
    if white > 0:
        dust |= z > white
    if black > 0:
        dust |= z < -black
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    images.copy_(torch.where(dust, mean + sd * noise, images))


def box_for(diameter: float, pixel_size: float) -> int:
    """A box in px, fast to transform, for a particle of a diameter in Å: at least 1.5 times as wide."""
    return good_size(GENEROUS * diameter / pixel_size)
