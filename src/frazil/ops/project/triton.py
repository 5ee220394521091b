"""Slices on a GPU: one program a slice and block of pixels, complex values as [pixels, 2] loads of 8 bytes."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from frazil.ops.project import Geometry

BLOCK = 256


@triton.jit
def locate(rotation_ptr, k_ptr, i, pixel, inside, pad, m, wide: tl.constexpr, flat: tl.constexpr):
    """Folded position of pixels in the half volume (flat: plane, fz = 0): voxel index, fractions, fold sign, and which are within reach."""
    kx = tl.load(k_ptr + 2 * pixel, mask=inside, other=0.0)
    ky = tl.load(k_ptr + 2 * pixel + 1, mask=inside, other=0.0)
    r = rotation_ptr + 9 * i
    x = pad * (tl.load(r) * kx + tl.load(r + 3) * ky)
    y = pad * (tl.load(r + 1) * kx + tl.load(r + 4) * ky)
    if flat:
        z = 0 * x
    else:
        z = pad * (tl.load(r + 2) * kx + tl.load(r + 5) * ky)
    sign = tl.where(x < 0, -1.0, 1.0).to(kx.dtype)
    x, y, z = x * sign, y * sign, z * sign
    x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
    inside = inside & (x < m) & (y >= -m) & (y < m) & (z >= -m) & (z < m)
    ix, iy, iz = tl.where(inside, x0, 0.0).to(tl.int32), tl.where(inside, y0, 0.0).to(tl.int32), tl.where(inside, z0, 0.0).to(tl.int32)
    if wide:
        iz = iz.to(tl.int64)
    if flat:
        voxel = (iy + m) * (m + 1) + ix
    else:
        voxel = ((iz + m) * (2 * m + 1) + iy + m) * (m + 1) + ix
    return voxel, x - x0, y - y0, z - z0, sign, inside


@triton.jit
def trilinear(volume_ptr, voxel, fx, fy, fz, sign, inside, m):
    """(pixels, 2) re, im of the half volume at voxel + (fx, fy, fz), conjugated where sign is −1."""
    part = tl.arange(0, 2)[None, :]
    keep = inside[:, None]
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    at = volume_ptr + 2 * voxel[:, None] + part
    gx, gy, gz = 1 - fx, 1 - fy, 1 - fz
    value = tl.load(at, mask=keep, other=0.0) * (gx * gy * gz)[:, None]
    value += tl.load(at + 2, mask=keep, other=0.0) * (fx * gy * gz)[:, None]
    value += tl.load(at + 2 * row, mask=keep, other=0.0) * (gx * fy * gz)[:, None]
    value += tl.load(at + 2 * row + 2, mask=keep, other=0.0) * (fx * fy * gz)[:, None]
    at += 2 * plane
    value += tl.load(at, mask=keep, other=0.0) * (gx * gy * fz)[:, None]
    value += tl.load(at + 2, mask=keep, other=0.0) * (fx * gy * fz)[:, None]
    value += tl.load(at + 2 * row, mask=keep, other=0.0) * (gx * fy * fz)[:, None]
    value += tl.load(at + 2 * row + 2, mask=keep, other=0.0) * (fx * fy * fz)[:, None]
    return tl.where(part == 0, value, value * sign[:, None])


@triton.jit
def bilinear(plane_ptr, voxel, fx, fy, sign, inside, m):
    """(pixels, 2) re, im of the half plane at voxel + (fx, fy), conjugated where sign is −1."""
    part = tl.arange(0, 2)[None, :]
    keep = inside[:, None]
    row = m + 1
    at = plane_ptr + 2 * voxel[:, None] + part
    gx, gy = 1 - fx, 1 - fy
    value = tl.load(at, mask=keep, other=0.0) * (gx * gy)[:, None]
    value += tl.load(at + 2, mask=keep, other=0.0) * (fx * gy)[:, None]
    value += tl.load(at + 2 * row, mask=keep, other=0.0) * (gx * fy)[:, None]
    value += tl.load(at + 2 * row + 2, mask=keep, other=0.0) * (fx * fy)[:, None]
    return tl.where(part == 0, value, value * sign[:, None])


@triton.jit
def _project(
    volume_ptr, which_ptr, elements, rotation_ptr, k_ptr, out_ptr, p, blocks, pad_ptr, m,
    wide: tl.constexpr, flat: tl.constexpr, stack: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * block + tl.arange(0, block)
    inside = pixel < p
    if stack:
        volume_ptr += 2 * tl.load(which_ptr + i) * elements
    voxel, fx, fy, fz, sign, reached = locate(rotation_ptr, k_ptr, i, pixel, inside, tl.load(pad_ptr), m, wide, flat)
    if flat:
        value = bilinear(volume_ptr, voxel, fx, fy, sign, reached, m)
    else:
        value = trilinear(volume_ptr, voxel, fx, fy, fz, sign, reached, m)
    tl.store(out_ptr + 2 * (i * p + pixel)[:, None] + tl.arange(0, 2)[None, :], value, mask=inside[:, None])


def project(
    volume: Tensor, geometry: Geometry, rotations: Tensor, coords: Tensor, pad: float, out: Tensor, which: Tensor | None
) -> None:
    """See frazil.ops.project."""
    real = volume.real.dtype
    n, p = out.shape
    blocks = triton.cdiv(p, BLOCK)
    # A Python float would reach the kernel as float32, so pad goes in as a tensor of the volume's type.
    arguments = [t.to(real).contiguous() for t in (rotations, coords)]
    scale = torch.full((1,), pad, dtype=real, device=volume.device)
    _project[(n * blocks,)](
        torch.view_as_real(volume), arguments[0] if which is None else which, geometry.elements, *arguments, torch.view_as_real(out), p,
        blocks, scale, geometry.m, wide=2 * geometry.elements >= 2**31, flat=geometry.flat, stack=which is not None, block=BLOCK,
        num_warps=4,
    )  # fmt: skip
