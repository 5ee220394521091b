"""Point-group sum on the CPU: tiles of rows of the half volume, each gathered through every operator while in the cache."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# (Numba's intrinsics and llvmlite carry no usable types.)
from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from frazil.ops.dispatch import numba_threads
from frazil.ops.project.cpu import FAST, LANE, splat, vector_at

TILE = 32  # side of the cubes gathered through one operator at a time: the rotated cube (1 MB) stays in the second-level cache


@intrinsic
def add_sample(_typing, data, weight, voxel, row, plane, fx, fy, fz, sign, out, out_weight, at):
    """out[2·at:2·at+2] and out_weight[at] += trilinear values at `voxel` + (fx, fy, fz), imaginary part times `sign`."""

    def generate(context, builder, signature, arguments):
        data_, weight_, voxel_, row_, plane_, fx_, fy_, fz_, sign_, out_, out_weight_, at_ = arguments
        size = 4 if signature.args[0].dtype == types.float32 else 8
        pointer = {k: context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1, 9, 10)}
        one = ir.Constant(voxel_.type, 1)

        def load(base, index, lanes):
            value = builder.load(vector_at(builder, base, index, lanes))
            value.align = size
            return value

        def lerp(a, b, f):
            return builder.fadd(a, builder.fmul(f, builder.fsub(b, a, flags=FAST), flags=FAST), flags=FAST)

        def part(value, lanes):
            return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(LANE, len(lanes)), lanes))

        corners = [voxel_, builder.add(voxel_, row_), builder.add(voxel_, plane_)]
        corners.append(builder.add(corners[2], row_))
        rows = [load(pointer[0], builder.shl(c, one), 4) for c in corners]
        pairs = [load(pointer[1], c, 2) for c in corners]
        y, z = splat(builder, fy_, 4), splat(builder, fz_, 4)
        both = lerp(lerp(rows[0], rows[1], y), lerp(rows[2], rows[3], y), z)
        y, z = part(y, [0, 1]), part(z, [0, 1])
        pair = lerp(lerp(pairs[0], pairs[1], y), lerp(pairs[2], pairs[3], y), z)
        value = lerp(part(both, [0, 1]), part(both, [2, 3]), splat(builder, fx_, 2))
        signs = builder.insert_element(ir.Constant(value.type, [1.0, 1.0]), sign_, ir.Constant(LANE, 1))
        target = vector_at(builder, pointer[9], builder.shl(at_, one), 2)
        old = builder.load(target)
        old.align = size
        builder.store(builder.fadd(old, builder.fmul(value, signs, flags=FAST), flags=FAST), target).align = size
        left, right = (builder.extract_element(pair, ir.Constant(LANE, k)) for k in (0, 1))
        target = builder.gep(pointer[10], [at_])
        builder.store(builder.fadd(builder.load(target), lerp(left, right, fx_), flags=FAST), target)
        return context.get_dummy_value()

    return types.void(data, weight, voxel, row, plane, fx, fy, fz, sign, out, out_weight, at), generate


@njit(fastmath=True, inline="always")
def _locate_row(operator, first, y, z, count, m, voxel, fx, fy, fz, sign):
    """Where the `count` voxels from x = first on of row (y, z) come from: as project.cpu.locate, along x."""
    one = operator.dtype.type(1)
    ax, ay, az = operator[0, 0], operator[1, 0], operator[2, 0]
    bx = operator[0, 1] * y + operator[0, 2] * z
    by = operator[1, 1] * y + operator[1, 2] * z
    bz = operator[2, 1] * y + operator[2, 2] * z
    for t in range(count):
        k = operator.dtype.type(np.int32(first + t))
        px, py, pz = ax * k + bx, ay * k + by, az * k + bz
        s = -one if px < 0 else one
        px, py, pz = px * s, py * s, pz * s
        x0, y0, z0 = np.floor(px), np.floor(py), np.floor(pz)
        fx[t], fy[t], fz[t], sign[t] = px - x0, py - y0, pz - z0, s
        rows = (np.int32(z0) + np.int32(m)) * np.int32(2 * m + 1) + np.int32(y0) + np.int32(m)
        voxel[t] = rows * np.int32(m + 1) + np.int32(x0)


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _symmetrise(data, weight, m, operators, tiles, widths, out, out_weight):
    """tiles (t, 2): first z and y of each tile that reaches the ball; widths (2M+1, 2M+1): voxels of a row inside it."""
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    for tile in prange(len(tiles)):
        voxel = np.empty(TILE, np.int32)
        fx, fy = np.empty(TILE, weight.dtype), np.empty(TILE, weight.dtype)
        fz, sign = np.empty(TILE, weight.dtype), np.empty(TILE, weight.dtype)
        z0, y0, x0 = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        for g in range(len(operators)):
            for z in range(z0, min(z0 + TILE, 2 * m + 1)):
                for y in range(y0, min(y0 + TILE, 2 * m + 1)):
                    count = min(widths[z, y] - x0, TILE)
                    ry, rz = weight.dtype.type(y - m), weight.dtype.type(z - m)
                    _locate_row(operators[g], x0, ry, rz, count, m, voxel, fx, fy, fz, sign)
                    first = z * plane + y * row + x0
                    for x in range(count):
                        v = np.int64(voxel[x])
                        add_sample(data, weight, v, row, plane, fx[x], fy[x], fz[x], sign[x], out, out_weight, first + x)


def symmetrise(data: Tensor, weight: Tensor, m: int, operators: Tensor) -> tuple[Tensor, Tensor]:
    """See frazil.ops.symmetrise. Tiles are dealt out in a fixed shuffled order, so that every thread gets long and short rows."""
    numba_threads(numba)
    c = np.arange(-m, m + 1)
    left = (m - 1) ** 2 - c[:, None] ** 2 - c[None, :] ** 2
    x = np.sqrt(np.maximum(left, 0)).astype(np.int64)
    widths = np.where(left >= 0, x + 1, 0)
    starts = np.arange(0, 2 * m + 1, TILE)
    tiles = np.stack(np.meshgrid(starts, starts, np.arange(0, m, TILE), indexing="ij"), -1).reshape(-1, 3)
    tiles = np.random.default_rng(0).permutation(tiles)
    out, out_weight = data.clone(), weight.clone()
    flat = [torch.view_as_real(t).view(-1).numpy() for t in (data, out)]
    _symmetrise(
        flat[0], weight.view(-1).numpy(), m, operators.to(weight.dtype).numpy(), tiles, widths, flat[1], out_weight.view(-1).numpy()
    )
    return out, out_weight
