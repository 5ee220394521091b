"""Insertion on the CPU: threads own z strips, of the volume or of less precise copies of it (see README.md)."""
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
from frazil.ops.project.cpu import BLOCK, FAST, LANE, locate, slice_matrices, splat, vector_at

if TYPE_CHECKING:
    from frazil.ops.project import Geometry

PRIVATE_BYTES = 1 << 30  # memory that private copies may take
STRIPS = 4  # workers that share a private copy
RUN = 4096  # slices that go to a copy before it is added to the volume: keeps the rounding of float32 sums near 1e-6


def _vector(builder, values):
    """LLVM vector of these scalars."""
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for lane, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.Constant(LANE, lane))
    return vector


def _add_at(builder, pointer, value, size):
    """Add a vector to memory, widened to the type that is there."""
    kind = pointer.type.pointee
    if kind != value.type:
        value = builder.fpext(value, kind)
    old = builder.load(pointer)
    old.align = size
    builder.store(builder.fadd(old, value, flags=FAST), pointer).align = size


@intrinsic
def scatter_rows(_typing, data, weight, voxel, row, fx, fy, share, re, im, w):
    """Add (re, im) and w to the 4 corners of one z plane: voxel, voxel + 1 and the same a row on; `share` is the z weight.

    A two-dimensional `data` holds records (re, im, w, unused) a voxel, and a row is one 8-lane sum (weight is not used);
    a flat one holds (re, im) pairs, weight numbers, and a row is a 4-lane and a 2-lane sum.
    """

    def generate(context, builder, signature, arguments):
        data_, weight_, voxel_, row_, fx_, fy_, share_, re_, im_, w_ = arguments
        kinds = signature.args
        size = 4 if kinds[0].dtype == types.float32 else 8
        target = context.make_array(kinds[0])(context, builder, data_).data
        real, index = fx_.type, voxel_.type

        def times(a, b):
            return builder.fmul(a, b, flags=FAST)

        gx, gy = (builder.fsub(ir.Constant(real, 1.0), f, flags=FAST) for f in (fx_, fy_))
        record = kinds[0].ndim == 2
        if record:
            zero = ir.Constant(real, 0.0)
            values = times(_vector(builder, [gx] * 4 + [fx_] * 4), _vector(builder, [re_, im_, w_, zero] * 2))
        else:
            weights = context.make_array(kinds[1])(context, builder, weight_).data
            values = times(_vector(builder, [gx, gx, fx_, fx_]), _vector(builder, [re_, im_] * 2))
            both = times(_vector(builder, [gx, fx_]), splat(builder, w_, 2))
        for at, part in ((voxel_, times(gy, share_)), (builder.add(voxel_, row_), times(fy_, share_))):
            first = builder.shl(at, ir.Constant(index, 2 if record else 1))
            lanes = 8 if record else 4
            _add_at(builder, vector_at(builder, target, first, lanes), times(values, splat(builder, part, lanes)), size)
            if not record:
                _add_at(builder, vector_at(builder, weights, at, 2), times(both, splat(builder, part, 2)), size)
        return context.get_dummy_value()

    return types.void(data, weight, voxel, row, fx, fy, share, re, im, w), generate


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _insert(data, weight, m, edges, matrices, kx, ky, slices, slice_weights):
    """data (groups, …): group g takes its run of the slices; its strip s writes the planes edges[s] … edges[s+1] − 1 only."""
    n, p, groups, strips = len(matrices), len(kx), len(data), len(edges) - 1
    row, plane = m + 1, (2 * m + 1) * (m + 1)
    one = kx.dtype.type(1)
    for worker in prange(groups * strips):
        g, s = worker // strips, worker % strips
        target, target_weight = data[g], weight[g]
        low, high = edges[s] * plane, edges[s + 1] * plane
        voxel, take = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
        fx, fy = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        fz, sign = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        for i in range(n * g // groups, n * (g + 1) // groups):
            d, w = slices[i], slice_weights[i]
            for first in range(0, p, BLOCK):
                count = min(BLOCK, p - first)
                locate(matrices[i], kx, ky, first, count, m, False, voxel, fx, fy, fz, sign)
                mine = 0
                for t in range(count):  # those with at least one plane here, without a branch
                    take[mine] = t
                    mine += np.int64((voxel[t] >= low - plane) & (voxel[t] < high))
                for c in range(mine):
                    t = take[c]
                    j, v = first + t, np.int64(voxel[t])
                    im = d[2 * j + 1] * sign[t]
                    if v >= low:
                        scatter_rows(target, target_weight, v, row, fx[t], fy[t], one - fz[t], d[2 * j], im, w[j])
                    if v + plane < high:
                        scatter_rows(target, target_weight, v + plane, row, fx[t], fy[t], fz[t], d[2 * j], im, w[j])


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _insert_flat(data, weight, m, edges, order, ends, matrices, kx, ky, slices, slice_weights):
    """data (K, …), half planes: plane k takes the slices order[ends[k]:ends[k+1]]; its strip s writes rows edges[s] … edges[s+1] − 1."""
    p, strips = len(kx), len(edges) - 1
    row, one, nothing = m + 1, kx.dtype.type(1), kx.dtype.type(0)
    for worker in prange(len(data) * strips):
        k, s = worker // strips, worker % strips
        target, target_weight = data[k], weight[k]
        low, high = edges[s] * row, edges[s + 1] * row
        voxel = np.empty(BLOCK, np.int32)
        fx, fy = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        fz, sign = np.empty(BLOCK, kx.dtype), np.empty(BLOCK, kx.dtype)
        for i in order[ends[k] : ends[k + 1]]:
            d, w = slices[i], slice_weights[i]
            for first in range(0, p, BLOCK):
                count = min(BLOCK, p - first)
                locate(matrices[i], kx, ky, first, count, m, True, voxel, fx, fy, fz, sign)
                for t in range(count):
                    j, v = first + t, np.int64(voxel[t])
                    im = d[2 * j + 1] * sign[t]
                    if low <= v < high - row:
                        scatter_rows(target, target_weight, v, row, fx[t], fy[t], one, d[2 * j], im, w[j])
                    elif low <= v < high:  # the next row is another strip's
                        scatter_rows(target, target_weight, v, 0, fx[t], nothing, one - fy[t], d[2 * j], im, w[j])
                    elif low - row <= v < low:
                        scatter_rows(target, target_weight, v + row, 0, fx[t], nothing, fy[t], d[2 * j], im, w[j])


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _drain(records, data, weight):
    """Add the (groups, voxels, 4) records to the flat volumes, in the order of the groups, and clear them."""
    voxels = len(weight)
    for block in prange((voxels + 4095) // 4096):
        for g in range(len(records)):
            source = records[g]
            for v in range(block * 4096, min(voxels, (block + 1) * 4096)):
                data[2 * v] += source[v, 0]
                data[2 * v + 1] += source[v, 1]
                weight[v] += source[v, 2]
                source[v, 0] = source[v, 1] = source[v, 2] = 0


def strip_edges(m: int, strips: int) -> np.ndarray:
    """(strips+1,) planes that cut 0 … 2M+1 into strips of about equal work: slices in all directions have M − |z| pixels at z."""
    share = np.arange(strips + 1) / strips
    z = np.where(share <= 0.5, np.sqrt(2 * share) - 1, 1 - np.sqrt(2 * (1 - share)))
    edges = np.rint(m + m * z).astype(np.int64)
    edges[-1] = 2 * m + 1
    return edges


def plan(voxels: int, pixels: int, workers: int, itemsize: int, same_type: bool) -> int:
    """Private copies of the volume to use, each shared by workers // copies strips; 0: write to the volume itself.

    Copies in the type of the slices halve the traffic where the volume is more precise, and save strips, in each of which
    every pixel is located again; clearing them and adding them up pays when there are more pixels than voxels.
    """
    wanted = 0 if same_type and workers <= STRIPS else -(-workers // STRIPS)
    return min(wanted, PRIVATE_BYTES // (voxels * 4 * itemsize)) if pixels >= voxels else 0


def insert_(
    data: Tensor, weight: Tensor, geometry: Geometry, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    which: Tensor | None,
) -> None:  # fmt: skip
    """See frazil.ops.insert_."""
    if geometry.flat:
        insert_flat_(data, weight, geometry.m, slices, slice_weights, rotations, coords, pad, which)
    elif which is None:
        insert_volume_(data, weight, geometry.m, slices, slice_weights, rotations, coords, pad)
    else:
        for k in which.unique().tolist():
            mine = torch.nonzero(which == k)[:, 0]
            insert_volume_(data[k], weight[k], geometry.m, slices[mine], slice_weights[mine], rotations[mine], coords, pad)


def insert_flat_(
    data: Tensor, weight: Tensor, m: int, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    which: Tensor | None,
) -> None:  # fmt: skip
    """Half planes. They stay in the cache, so there are no copies: threads share planes and, where these are few, strips of rows."""
    real, elements = slice_weights.dtype, (2 * m + 1) * (m + 1)
    of = torch.zeros(len(slices), dtype=torch.int64) if which is None else which
    planes = weight.numel() // elements
    used, count = of.unique(return_counts=True)
    strips = min(m, -(-numba_threads(numba) // len(used)))
    ends = np.zeros(planes + 1, np.int64)
    ends[1:] = torch.zeros(planes, dtype=torch.int64).index_copy(0, used, count).cumsum(0).numpy()
    kx, ky = (coords[:, c].to(real).contiguous().numpy() for c in (0, 1))
    _insert_flat(
        torch.view_as_real(data).view(planes, -1).numpy(), weight.view(planes, -1).numpy(), m, strip_edges(m, strips),
        torch.argsort(of, stable=True).numpy(), ends, slice_matrices(rotations, pad, real, True), kx, ky,
        torch.view_as_real(slices).flatten(1).numpy(), slice_weights.numpy(),
    )  # fmt: skip


def insert_volume_(
    data: Tensor, weight: Tensor, m: int, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float
) -> None:
    """Half volumes: private copies, strips of z planes."""
    real = slice_weights.dtype
    workers = numba_threads(numba)
    kx, ky = (coords[:, c].to(real).contiguous().numpy() for c in (0, 1))
    matrices = slice_matrices(rotations, pad, real, False)
    values, values_weight = torch.view_as_real(slices).flatten(1).numpy(), slice_weights.numpy()
    flat, flat_weight = torch.view_as_real(data).view(-1).numpy(), weight.view(-1).numpy()
    copies = plan(weight.numel(), slices.numel(), workers, real.itemsize, real == weight.dtype)
    if not copies:
        edges = strip_edges(m, min(workers, m))
        _insert(flat[None], flat_weight[None], m, edges, matrices, kx, ky, values, values_weight)
        return
    edges = strip_edges(m, min(workers // copies, m))
    records = np.zeros((copies, weight.numel(), 4), values_weight.dtype)
    unused = np.empty((copies, 0), values_weight.dtype)
    for start in range(0, len(matrices), RUN * copies):
        part = slice(start, start + RUN * copies)
        _insert(records, unused, m, edges, matrices[part], kx, ky, values[part], values_weight[part])
        _drain(records, flat, flat_weight)
