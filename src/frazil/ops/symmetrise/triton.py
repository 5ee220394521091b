"""Point-group sum on a GPU: one program a run of voxels, all operators in turn, sums in registers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frazil.ops.project.triton import trilinear

BLOCK = 256


@triton.jit
def _real_trilinear(volume_ptr, voxel, fx, fy, fz, inside, m):
    """(voxels,) values of a real half volume at voxel + (fx, fy, fz)."""
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    at = volume_ptr + voxel
    near = tl.load(at, mask=inside, other=0.0) * (1 - fx) + tl.load(at + 1, mask=inside, other=0.0) * fx
    up = tl.load(at + row, mask=inside, other=0.0) * (1 - fx) + tl.load(at + row + 1, mask=inside, other=0.0) * fx
    at += plane
    far = tl.load(at, mask=inside, other=0.0) * (1 - fx) + tl.load(at + 1, mask=inside, other=0.0) * fx
    both = tl.load(at + row, mask=inside, other=0.0) * (1 - fx) + tl.load(at + row + 1, mask=inside, other=0.0) * fx
    return (near * (1 - fy) + up * fy) * (1 - fz) + (far * (1 - fy) + both * fy) * fz


@triton.jit
def _symmetrise(data_ptr, weight_ptr, operator_ptr, out_ptr, out_weight_ptr, voxels, g, m, wide: tl.constexpr, block: tl.constexpr):
    program = tl.program_id(0)
    if wide:
        program = program.to(tl.int64)
    here = program * block + tl.arange(0, block)
    stored = here < voxels
    part = tl.arange(0, 2)[None, :]
    kx = here % (m + 1)
    ky = (here // (m + 1)) % (2 * m + 1) - m
    kz = here // ((m + 1) * (2 * m + 1)) - m
    ball = stored & (kx * kx + ky * ky + kz * kz <= (m - 1) * (m - 1))
    value = tl.load(data_ptr + 2 * here[:, None] + part, mask=stored[:, None], other=0.0)
    w = tl.load(weight_ptr + here, mask=stored, other=0.0)
    kx, ky, kz = kx.to(w.dtype), ky.to(w.dtype), kz.to(w.dtype)
    for i in range(g):
        r = operator_ptr + 9 * i
        x = tl.load(r) * kx + tl.load(r + 1) * ky + tl.load(r + 2) * kz
        y = tl.load(r + 3) * kx + tl.load(r + 4) * ky + tl.load(r + 5) * kz
        z = tl.load(r + 6) * kx + tl.load(r + 7) * ky + tl.load(r + 8) * kz
        sign = tl.where(x < 0, -1.0, 1.0).to(w.dtype)
        x, y, z = tl.where(ball, x * sign, 0.0), tl.where(ball, y * sign, 0.0), tl.where(ball, z * sign, 0.0)
        x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
        iz = z0.to(tl.int64) if wide else z0.to(tl.int32)
        voxel = ((iz + m) * (2 * m + 1) + y0.to(tl.int32) + m) * (m + 1) + x0.to(tl.int32)
        value += trilinear(data_ptr, voxel, x - x0, y - y0, z - z0, sign, ball, m)
        w += _real_trilinear(weight_ptr, voxel, x - x0, y - y0, z - z0, ball, m)
    tl.store(out_ptr + 2 * here[:, None] + part, value, mask=stored[:, None])
    tl.store(out_weight_ptr + here, w, mask=stored)


def symmetrise(data: Tensor, weight: Tensor, m: int, operators: Tensor) -> tuple[Tensor, Tensor]:
    """See frazil.ops.symmetrise."""
    out, out_weight = torch.empty_like(data), torch.empty_like(weight)
    matrices = operators.to(weight).contiguous()
    _symmetrise[(triton.cdiv(data.numel(), BLOCK),)](
        torch.view_as_real(data), weight, matrices, torch.view_as_real(out), out_weight, data.numel(), len(matrices), m,
        wide=2 * data.numel() >= 2**31, block=BLOCK, num_warps=4,
    )  # fmt: skip
    return out, out_weight
