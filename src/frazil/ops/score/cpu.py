"""score in Numba: a pair's product conj(S) Y stays in the first-level cache while only the wanted shifts are taken from it."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from frazil.ops.dispatch import numba_threads

BLOCK = 16  # pairs a task


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _score(slices, start, orientation, image, shift, log_prior, images, power, phases, big, cc, out):  # noqa: ANN001
    """Pair q holds the entries start[q] … start[q+1]. slices, images: (·, 2p) interleaved; phases: (T, 2p) split, [re | −im]."""
    p = power.shape[1]
    small = out.shape[2]
    pairs = len(start) - 1
    for task in numba.prange((pairs + BLOCK - 1) // BLOCK):
        z = np.empty(2 * p, power.dtype)
        for q in range(task * BLOCK, min(pairs, (task + 1) * BLOCK)):
            first = start[q]
            y, w = images[image[first]], power[image[first]]
            for j in range(big):
                s = slices[orientation[first] * big + j]
                norm = power.dtype.type(0)
                for k in range(p):
                    sr, si, yr, yi = s[2 * k], s[2 * k + 1], y[2 * k], y[2 * k + 1]
                    z[k] = sr * yr + si * yi
                    z[p + k] = sr * yi - si * yr
                    norm += (sr * sr + si * si) * w[k]
                for e in range(first, start[q + 1]):
                    t = shift[e] * small
                    if small == 4:
                        e0, e1, e2, e3 = phases[t], phases[t + 1], phases[t + 2], phases[t + 3]
                        a0 = power.dtype.type(0)
                        a1 = power.dtype.type(0)
                        a2 = power.dtype.type(0)
                        a3 = power.dtype.type(0)
                        for k in range(2 * p):
                            v = z[k]
                            a0 += v * e0[k]
                            a1 += v * e1[k]
                            a2 += v * e2[k]
                            a3 += v * e3[k]
                        out[e, j, 0], out[e, j, 1], out[e, j, 2], out[e, j, 3] = a0, a1, a2, a3
                    else:
                        for u in range(small):
                            f = phases[t + u]
                            a = power.dtype.type(0)
                            for k in range(2 * p):
                                a += z[k] * f[k]
                            out[e, j, u] = a
                    for u in range(small):
                        if cc:
                            out[e, j, u] = (out[e, j, u] / np.sqrt(norm) if norm > 0 else 0) + log_prior[e]
                        else:
                            out[e, j, u] += log_prior[e] - norm


def score(slices, orientation, image, shift, log_prior, images, power, phases, children, cc) -> Tensor:  # noqa: ANN001
    """(n, C, c) values; see ops/score."""
    numba_threads(numba)
    out = torch.empty(len(orientation), *children, dtype=power.dtype)
    change = (orientation[1:] != orientation[:-1]) | (image[1:] != image[:-1])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(change)[:, 0] + 1, torch.tensor([len(orientation)])])
    split = torch.cat([phases.real.T, -phases.imag.T], 1).contiguous()
    flat = [torch.view_as_real(x.contiguous().resolve_conj()).flatten(1) for x in (slices, images)]
    args = (flat[0], start, orientation, image, shift, log_prior.to(power.dtype), flat[1], power.contiguous(), split)
    arrays = [x.contiguous().numpy() for x in args]
    _score(*arrays, children[0], cc, out.numpy())  # pyright: ignore[reportCallIssue]
    return out
