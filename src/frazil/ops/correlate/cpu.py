"""Best correlation on the CPU: a batch of products that fits the cache, MKL's inverse transforms, one pass for the maximum."""
# pyright: reportCallIssue=false
from __future__ import annotations

import numba
import torch
from numba import njit, prange
from torch import Tensor

from frazil.ops.dispatch import numba_threads, threads

BATCH = 1 << 18  # real values of a batch for each thread: products and correlations (2 MB) stay in the second-level cache


@njit(parallel=True, fastmath=True, nogil=True, cache=True)
def _products(image, references, out):
    """out[r] = image · conj(references[r]); all flat in space."""
    for r in prange(len(references)):
        reference, target = references[r], out[r]
        for k in range(len(image)):
            x, a = image[k], reference[k]
            re = x.real * a.real + x.imag * a.imag
            im = x.imag * a.real - x.real * a.imag
            target[k] = complex(re, im)


@njit(parallel=True, nogil=True, cache=True)
def _raise(values, best, index, first):
    """best = max(best, values[r]), index = first + r where that is larger."""
    parts = (len(best) + 4095) // 4096
    for part in prange(parts):
        low, high = part * 4096, min(len(best), part * 4096 + 4096)
        for r in range(len(values)):
            for k in range(low, high):
                if values[r, k] > best[k]:
                    best[k] = values[r, k]
                    index[k] = first + r


def correlate_max_(images: Tensor, references: Tensor, width: int, best_: Tensor, index_: Tensor, first: int) -> None:
    """See frazil.ops.correlate."""
    b, h, half = images.shape
    n = len(references)
    numba_threads(numba)
    batch = max(1, min(n, BATCH * threads() // (h * width)))
    flat = references.reshape(n, -1).numpy()
    product = torch.empty(batch, h, half, dtype=images.dtype)
    for i in range(b):
        image = images[i].reshape(-1).numpy()
        best, index = best_[i].view(-1).numpy(), index_[i].view(-1).numpy()
        for start in range(0, n, batch):
            part = flat[start : start + batch]
            _products(image, part, product.view(batch, -1).numpy()[: len(part)])
            values = torch.fft.irfft2(product[: len(part)], s=(h, width))
            _raise(values.view(len(part), -1).numpy(), best, index, first + start)
