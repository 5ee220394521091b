"""Insertion on a GPU: one program a slice and block of pixels, atomic sums in the type of the volume."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from frazil.ops.project.triton import locate

if TYPE_CHECKING:
    from frazil.ops.project import Geometry

BLOCK = 256


@triton.jit
def _add_row(data_ptr, weight_ptr, voxel, value, w, fx, share, keep):
    """Add share · (1 − fx, fx) of value (pixels, 2) and w (pixels,) to the voxels `voxel` and the next in x."""
    at = data_ptr + 2 * voxel[:, None] + tl.arange(0, 2)[None, :]
    left, right = share * (1 - fx), share * fx
    tl.atomic_add(at, value * left[:, None], mask=keep[:, None], sem="relaxed")
    tl.atomic_add(at + 2, value * right[:, None], mask=keep[:, None], sem="relaxed")
    tl.atomic_add(weight_ptr + voxel, w * left, mask=keep, sem="relaxed")
    tl.atomic_add(weight_ptr + voxel + 1, w * right, mask=keep, sem="relaxed")


@triton.jit
def _insert(
    data_ptr, weight_ptr, which_ptr, elements, slice_ptr, slice_weight_ptr, rotation_ptr, k_ptr, p, blocks, pad_ptr, m,
    wide: tl.constexpr, flat: tl.constexpr, stack: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * block + tl.arange(0, block)
    inside = pixel < p
    if stack:
        volume = tl.load(which_ptr + i) * elements
        data_ptr += 2 * volume
        weight_ptr += volume
    voxel, fx, fy, fz, sign, reached = locate(rotation_ptr, k_ptr, i, pixel, inside, tl.load(pad_ptr), m, wide, flat)
    part = tl.arange(0, 2)[None, :]
    source = i * p + pixel
    value = tl.load(slice_ptr + 2 * source[:, None] + part, mask=reached[:, None], other=0.0)
    value = tl.where(part == 0, value, value * sign[:, None])
    w = tl.load(slice_weight_ptr + source, mask=reached, other=0.0)
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    _add_row(data_ptr, weight_ptr, voxel, value, w, fx, (1 - fy) * (1 - fz), reached)
    _add_row(data_ptr, weight_ptr, voxel + row, value, w, fx, fy * (1 - fz), reached)
    if not flat:
        _add_row(data_ptr, weight_ptr, voxel + plane, value, w, fx, (1 - fy) * fz, reached)
        _add_row(data_ptr, weight_ptr, voxel + plane + row, value, w, fx, fy * fz, reached)


def insert_(
    data: Tensor, weight: Tensor, geometry: Geometry, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    which: Tensor | None,
) -> None:  # fmt: skip
    """See frazil.ops.insert_."""
    real = weight.dtype
    n, p = slices.shape
    blocks = triton.cdiv(p, BLOCK)
    values = [torch.view_as_real(slices).to(real), slice_weights.to(real)]
    where = [t.to(real).contiguous() for t in (rotations, coords)]
    scale = torch.full((1,), pad, dtype=real, device=data.device)
    _insert[(n * blocks,)](
        torch.view_as_real(data), weight, where[0] if which is None else which, geometry.elements, *values, *where, p, blocks, scale,
        geometry.m, wide=2 * geometry.elements >= 2**31, flat=geometry.flat, stack=which is not None, block=BLOCK, num_warps=4,
    )  # fmt: skip
