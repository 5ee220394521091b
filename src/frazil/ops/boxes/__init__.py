"""Boxes cut out of a micrograph, and brought to mean 0 and standard deviation 1 of their background (spec/processing 5.3).

`cut`:     out[i, y, x] = micrograph[corner_y + y, corner_x + x], the nearest pixel of the edge where that lies outside.
`level_`:  with B the pixels farther than `radius` from pixel N/2, and a + b x + c y the least-squares plane (or a alone) through them,

    image ← factor · (image − a − b x − c y) / sd,    sd² = mean over B of (image − a − b x − c y)²
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def cut(micrograph: Tensor, corner: Tensor, box: int, *, implementation: str | None = None) -> Tensor:
    """(n, N, N) boxes of side `box` in the type of `micrograph` (H, W); corner (n, 2) int64, x and y of their first pixel, may be outside.

    Raises ValueError for shapes or types that do not fit.
    """
    if micrograph.ndim != 2 or corner.ndim != 2 or corner.shape[1] != 2 or corner.is_floating_point() or box < 1:
        raise ValueError(f"cut: micrograph {tuple(micrograph.shape)}, corner {tuple(corner.shape)} {corner.dtype}, box {box} do not fit")
    if corner.device != micrograph.device:
        raise ValueError(f"cut: micrograph on {micrograph.device}, corners on {corner.device}; expected one device")
    if _pick(micrograph, implementation) == "cpu":
        from .cpu import cut as run
    else:
        from .reference import cut as run
    return run(micrograph, corner, box)


def level_(images: Tensor, radius: float, factor: float, *, ramp: bool = True, implementation: str | None = None) -> Tensor:
    """(n, 2) float64 mean and standard deviation of the background of images (n, N, N), which are levelled in place, see the module.

    factor: −1 inverts the contrast. The mean is the plane's at pixel N/2. An image whose sd is 0 or that holds values that are not finite
    has sd 0 or NaN in the answer; its pixels mean nothing then. Raises ValueError where fewer than 3 pixels are background.
    """
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.is_floating_point():
        raise ValueError(f"level_: images {tuple(images.shape)} {images.dtype}; expected (n, N, N) floats")
    side = images.shape[-1] / 2
    if not 0 <= radius < side * 2**0.5 - 2:
        raise ValueError(f"level_: no background outside radius {radius:g} px in a box of {images.shape[-1]} px")
    if _pick(images, implementation) == "cpu":
        from .cpu import level_ as run
    else:
        from .reference import level_ as run
    return run(images, radius, factor, ramp)


def _pick(tensor: Tensor, implementation: str | None) -> str:
    """The kernels are for CPUs; on a GPU plain torch reads and writes each box a few times, which takes milliseconds."""
    if implementation is None and tensor.is_cuda:
        return "reference"
    return pick(tensor, implementation, op="boxes", cpu_dtypes=(torch.float32, torch.float64))
