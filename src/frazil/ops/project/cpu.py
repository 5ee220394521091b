"""Slices on the CPU: per block of pixels a vectorised pass for the positions, then a pass of 16-byte row loads (see README.md)."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# (Numba's intrinsics and llvmlite carry no usable types.)
from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from frazil.ops.dispatch import numba_threads

if TYPE_CHECKING:
    from frazil.ops.project import Geometry

BLOCK = 256  # pixels located at a time: their positions (6 kB) stay in the first-level cache
LANE = ir.IntType(32)
FAST = ("fast",)


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """LLVM vector with `value` in every lane."""
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(LANE, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(LANE, lanes), [0] * lanes))


def vector_at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """Pointer to `lanes` consecutive elements of the array at `base`, from element `index` on."""
    return builder.bitcast(builder.gep(base, [index]), ir.VectorType(base.type.pointee, lanes).as_pointer())


@intrinsic
def gather_pixel(_typing, volume, voxel, row, plane, fx, fy, fz, sign, out, at):
    """out[at:at+2] = trilinear value at `voxel` + (fx, fy, fz), imaginary part times `sign`; volume and out are re, im pairs.

    The x neighbours are adjacent, so a row is one load of 4 numbers; y and z are interpolated 4 lanes wide, x last.
    Written as LLVM vectors since Numba turns neither such loads (its SLP pass is off) nor hardware gathers into fast code.
    """

    def generate(context, builder, signature, arguments):
        volume_, voxel_, row_, plane_, fx_, fy_, fz_, sign_, out_, at_ = arguments
        source = context.make_array(signature.args[0])(context, builder, volume_).data
        target = context.make_array(signature.args[8])(context, builder, out_).data
        size = 4 if signature.args[0].dtype == types.float32 else 8

        def load(index):
            value = builder.load(vector_at(builder, source, builder.shl(index, ir.Constant(index.type, 1)), 4))
            value.align = size
            return value

        def lerp(a, b, f):
            return builder.fadd(a, builder.fmul(f, builder.fsub(b, a, flags=FAST), flags=FAST), flags=FAST)

        up, far = builder.add(voxel_, row_), builder.add(voxel_, plane_)
        y, z = splat(builder, fy_, 4), splat(builder, fz_, 4)
        rows = lerp(lerp(load(voxel_), load(up), y), lerp(load(far), load(builder.add(far, row_)), y), z)
        low, high = (builder.shuffle_vector(rows, rows, ir.Constant(ir.VectorType(LANE, 2), part)) for part in ([0, 1], [2, 3]))
        signs = builder.insert_element(ir.Constant(low.type, [1.0, 1.0]), sign_, ir.Constant(LANE, 1))
        value = builder.fmul(lerp(low, high, splat(builder, fx_, 2)), signs, flags=FAST)
        builder.store(value, vector_at(builder, target, at_, 2)).align = size
        return context.get_dummy_value()

    return types.void(volume, voxel, row, plane, fx, fy, fz, sign, out, at), generate


@intrinsic
def gather_flat(_typing, plane, voxel, row, fx, fy, sign, out, at):
    """gather_pixel of a half plane: out[at:at+2] = bilinear value at `voxel` + (fx, fy)."""

    def generate(context, builder, signature, arguments):
        plane_, voxel_, row_, fx_, fy_, sign_, out_, at_ = arguments
        source = context.make_array(signature.args[0])(context, builder, plane_).data
        target = context.make_array(signature.args[6])(context, builder, out_).data
        size = 4 if signature.args[0].dtype == types.float32 else 8

        def load(index):
            value = builder.load(vector_at(builder, source, builder.shl(index, ir.Constant(index.type, 1)), 4))
            value.align = size
            return value

        def lerp(a, b, f):
            return builder.fadd(a, builder.fmul(f, builder.fsub(b, a, flags=FAST), flags=FAST), flags=FAST)

        rows = lerp(load(voxel_), load(builder.add(voxel_, row_)), splat(builder, fy_, 4))
        low, high = (builder.shuffle_vector(rows, rows, ir.Constant(ir.VectorType(LANE, 2), part)) for part in ([0, 1], [2, 3]))
        signs = builder.insert_element(ir.Constant(low.type, [1.0, 1.0]), sign_, ir.Constant(LANE, 1))
        value = builder.fmul(lerp(low, high, splat(builder, fx_, 2)), signs, flags=FAST)
        builder.store(value, vector_at(builder, target, at_, 2)).align = size
        return context.get_dummy_value()

    return types.void(plane, voxel, row, fx, fy, sign, out, at), generate


@njit(fastmath=True, inline="always")
def locate(matrix, kx, ky, first, count, m, flat, voxel, fx, fy, fz, sign):
    """Voxel index, fractions and fold sign (−1: conjugate) of `count` pixels; branch-free so that it vectorises.

    `matrix` (6): pad times the first two rows of a rotation, as pairs for x, y, z (flat: those of z are 0, and so is fz).
    """
    middle = np.int32(0) if flat else np.int32(m)
    one = matrix.dtype.type(1)
    for t in range(count):
        u, v = kx[first + t], ky[first + t]
        x, y, z = matrix[0] * u + matrix[1] * v, matrix[2] * u + matrix[3] * v, matrix[4] * u + matrix[5] * v
        s = -one if x < 0 else one
        x, y, z = x * s, y * s, z * s
        x0, y0, z0 = np.floor(x), np.floor(y), np.floor(z)
        fx[t], fy[t], fz[t], sign[t] = x - x0, y - y0, z - z0, s
        rows = (np.int32(z0) + middle) * np.int32(2 * m + 1) + np.int32(y0) + np.int32(m)
        voxel[t] = rows * np.int32(m + 1) + np.int32(x0)


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _project(volume, which, m, flat, matrices, kx, ky, chunks, out):
    n, p = len(matrices), len(kx)
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    elements = plane if flat else (2 * m + 1) * plane
    for chunk in prange(chunks):
        voxel = np.empty(BLOCK, np.int32)
        fx, fy = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        fz, sign = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        for i in range(n * chunk // chunks, n * (chunk + 1) // chunks):
            base = which[i] * elements if len(which) else 0
            for first in range(0, p, BLOCK):
                count = min(BLOCK, p - first)
                locate(matrices[i], kx, ky, first, count, m, flat, voxel, fx, fy, fz, sign)
                if flat:
                    for t in range(count):
                        gather_flat(volume, base + np.int64(voxel[t]), row, fx[t], fy[t], sign[t], out[i], 2 * (first + t))
                else:
                    for t in range(count):
                        gather_pixel(volume, base + np.int64(voxel[t]), row, plane, fx[t], fy[t], fz[t], sign[t], out[i], 2 * (first + t))


def slice_matrices(rotations: Tensor, pad: float, dtype: torch.dtype, flat: bool) -> np.ndarray:
    """(n, 6) pad · R[0, c], pad · R[1, c] for c = x, y, z: what `locate` takes. flat: z is 0."""
    pairs = (pad * rotations[:, :2].double()).transpose(1, 2).to(dtype).contiguous()
    if flat:
        pairs[:, 2] = 0
    return pairs.reshape(-1, 6).numpy()


def project(
    volume: Tensor, geometry: Geometry, rotations: Tensor, coords: Tensor, pad: float, out: Tensor, which: Tensor | None
) -> None:
    """See frazil.ops.project. Threads take contiguous runs of slices: neighbours in a sampling grid share cache lines."""
    real = volume.real.dtype
    kx, ky = (coords[:, c].to(real).contiguous().numpy() for c in (0, 1))
    chunks = min(len(rotations), 8 * numba_threads(numba))
    of = np.empty(0, np.int64) if which is None else which.contiguous().numpy()
    matrices = slice_matrices(rotations, pad, real, geometry.flat)
    values = torch.view_as_real(volume).reshape(-1).numpy()
    _project(values, of, geometry.m, geometry.flat, matrices, kx, ky, chunks, torch.view_as_real(out).flatten(1).numpy())
