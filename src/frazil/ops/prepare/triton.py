"""Normalise, move and mask on a GPU: the stored image is read twice, both results are written once, nothing between."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024  # a block


@triton.jit
def _moved(images, shift, factor, i, pixel, n, inside):  # noqa: ANN001, ANN202
    """factor · image at pixels of the moved image; 0 outside."""
    y, x = pixel // n - tl.load(shift + 2 * i + 1), pixel % n - tl.load(shift + 2 * i)
    there = inside & (y >= 0) & (y < n) & (x >= 0) & (x < n)
    gain = tl.load(factor + i)
    return tl.load(images + i * n * n + y * n + x, mask=there, other=0.0).to(gain.dtype) * gain


@triton.jit
def _sum_outside(images, shift, factor, circle, part, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    i, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n * n
    outside = 1.0 - tl.load(circle + pixel, mask=inside, other=1.0)
    value = _moved(images, shift, factor, i, pixel, n, inside & (outside > 0))
    tl.store(part + i * tl.num_programs(1) + block, tl.sum(value * outside, 0))


@triton.jit
def _write(images, shift, factor, circle, fill, plain, masked, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    i, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n * n
    value = _moved(images, shift, factor, i, pixel, n, inside)
    weight, background = tl.load(circle + pixel, mask=inside, other=0.0), tl.load(fill + i)
    at = i * n * n + pixel
    tl.store(plain + at, value, mask=inside)
    tl.store(masked + at, background + weight * (value - background), mask=inside)


def prepare(images: Tensor, shift: Tensor, factor: Tensor, circle: Tensor) -> tuple[Tensor, Tensor]:
    """See frazil.ops.prepare."""
    b, n = len(images), images.shape[-1]
    plain, masked = (torch.empty(images.shape, dtype=factor.dtype, device=images.device) for _ in range(2))
    if b == 0:
        return plain, masked
    grid = (b, triton.cdiv(n * n, PIXELS))
    given = (images.contiguous(), shift.contiguous(), factor.contiguous(), circle.contiguous())
    part = torch.empty(grid, dtype=factor.dtype, device=images.device)
    _sum_outside[grid](*given, part, n, BLOCK=PIXELS)
    fill = part.sum(1) / (1 - circle).sum().clamp(min=torch.finfo(circle.dtype).tiny)
    _write[grid](*given, fill, plain, masked, n, BLOCK=PIXELS)
    return plain, masked
