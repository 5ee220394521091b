"""`accumulate` on CPUs: A = Γ E in chunks of rows that stay in cache (MKL; sample by sample for EntryWeights), one Numba loop for the rest.

Threads own pixels, not slices: no two write to the same place however the rows are spread over the slices, D, W and the shell
sums do not depend on the number of threads, and nothing is copied. Complex arrays are read as floats, re and im interleaved.
"""
from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from frazil.ops.accumulate import EntryWeights
from frazil.ops.dispatch import numba_threads

WORK_BYTES = 8 << 20  # of A
LOOSE = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; infinities and NaN keep their meaning


def _floats(x: Tensor) -> NDArray:
    """(n, 2p) view of a complex (n, p) tensor."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x).reshape(len(x), -1).numpy()


@njit(parallel=True, fastmath=LOOSE, cache=True)
def _mix(gamma, shift, start, pair, child, right, out, total):  # noqa: ANN001, ANN202
    """out[r] = Σ Γ E over the samples of row r, total[r] = Σ Γ: a posterior has few shifts once it is sharp."""
    for r in prange(len(pair)):
        row, j = out[r], child[r]
        row[:] = 0
        total[r] = 0
        for e in range(start[pair[r]], start[pair[r] + 1]):
            for u in range(gamma.shape[2]):
                g = gamma[e, j, u]
                if g != 0:
                    total[r] += g
                    phase = right[shift[e] * gamma.shape[2] + u]
                    for k in range(len(row)):
                        row[k] += g * phase[k]


@njit(parallel=True, fastmath=LOOSE, cache=True)
def _fold(a_rows, gamma, row_slice, row_image, slices, masked, gain, unmasked, inverse, use, slice_class,  # noqa: ANN001, ANN202
          data, weight, pixels, part):
    """Add a chunk of rows to data, weight and pixels (2, p); part[block, r] = the four sums of row r over a block of pixels."""
    p = gain.shape[1]
    block = -(-p // part.shape[0])
    for b in prange(part.shape[0]):
        lo, hi = min(p, b * block), min(p, b * block + block)
        n = hi - lo
        sums = np.zeros(2 * n, a_rows.dtype)
        for r in range(a_rows.shape[0]):
            k, i, g = row_slice[r], row_image[r], gamma[r]
            a, s, u = a_rows[r, 2 * lo:2 * hi], slices[k, 2 * lo:2 * hi], unmasked[i, 2 * lo:2 * hi]
            f, c, v = masked[i, 2 * lo:2 * hi], inverse[i, lo:hi], gain[i, lo:hi]
            d, w, m = data[k, 2 * lo:2 * hi], weight[k, lo:hi], use[slice_class[k], lo:hi]
            for j in range(n):
                d[2 * j] += a[2 * j] * u[2 * j] - a[2 * j + 1] * u[2 * j + 1]
                d[2 * j + 1] += a[2 * j] * u[2 * j + 1] + a[2 * j + 1] * u[2 * j]
            for j in range(n):  # a loop of its own: with fewer arrays in a loop the compiler vectorises it
                w[j] += g * c[j]
            zero = a_rows.dtype.type(0)
            x0, q0, x1, q1 = zero, zero, zero, zero
            for j in range(n):
                zr = f[2 * j] * a[2 * j] - f[2 * j + 1] * a[2 * j + 1]
                zi = f[2 * j] * a[2 * j + 1] + f[2 * j + 1] * a[2 * j]
                x = s[2 * j] * zr + s[2 * j + 1] * zi
                q = (s[2 * j] * s[2 * j] + s[2 * j + 1] * s[2 * j + 1]) * v[j] * g
                sums[2 * j] += x
                sums[2 * j + 1] += q
                x0 += x
                q0 += q
                x1 += m[j] * x
                q1 += m[j] * q
            part[b, r, 0], part[b, r, 1], part[b, r, 2], part[b, r, 3] = x0, q0, x1, q1
        for j in range(n):  # into float64 once a chunk
            pixels[0, lo + j] += sums[2 * j]
            pixels[1, lo + j] += sums[2 * j + 1]


def accumulate(slices: Tensor, row_slice: Tensor, row_image: Tensor, weights: Tensor | EntryWeights, phases: Tensor, masked: Tensor,
               gain: Tensor, unmasked: Tensor, inverse: Tensor, scale_pixels: Tensor,
               slice_class: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See frazil.ops.accumulate: (D, W, Σ_rows x (p,), Σ_rows q (p,), rows)."""
    threads = numba_threads(numba)
    n, p = len(row_slice), slices.shape[1]
    right = torch.view_as_real(phases.resolve_conj().T.contiguous()).reshape(phases.shape[1], 2 * p)
    data, weight = torch.zeros_like(slices.resolve_conj(), memory_format=torch.contiguous_format), gain.new_zeros(slices.shape)
    pixels, rows = torch.zeros(2, p, dtype=torch.float64), gain.new_empty(n, 4)
    chunk = max(16, WORK_BYTES // (2 * p * gain.element_size()) // 16 * 16)
    blocks = max(1, min(-(-p // 64), max(threads, -(-p // 704))))  # shorter loops lose to their overhead, longer ones leave the cache
    a, part = gain.new_empty(min(chunk, n), 2 * p), gain.new_empty(blocks, min(chunk, n), 4)
    gamma_of = gain.new_empty(n) if isinstance(weights, EntryWeights) else weights.sum(1)
    gamma = gamma_of.numpy()
    row_s, row_i = row_slice.contiguous().numpy(), row_image.contiguous().numpy()
    fixed = (_floats(slices), _floats(masked), gain.contiguous().numpy(), _floats(unmasked), inverse.contiguous().numpy(),
             scale_pixels.to(gain).contiguous().numpy(), slice_class.contiguous().numpy(),
             torch.view_as_real(data).view(len(data), 2 * p).numpy(), weight.numpy(), pixels.numpy())
    for first in range(0, n, chunk):
        m = min(chunk, n - first)
        here = slice(first, first + m)
        if isinstance(weights, EntryWeights):
            some = weights[here]
            arrays = (some.gamma, some.shift, some.start, some.pair, some.child, right, a[:m], gamma_of[here])
            _mix(*(x.contiguous().numpy() for x in arrays))
        else:
            torch.mm(weights[here], right, out=a[:m])
        _fold(a[:m].numpy(), gamma[here], row_s[here], row_i[here], *fixed, part[:, :m].numpy())
        torch.sum(part[:, :m], 0, out=rows[here])
    return data, weight, pixels[0], pixels[1], rows
