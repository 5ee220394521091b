"""Best correlation on a GPU: products of a batch of (image, reference) pairs, cuFFT, and one pass that takes the maximum in registers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
BATCH = 1 << 30  # bytes of products and correlations at a time


@triton.jit
def _products(image_ptr, reference_ptr, out_ptr, pixels, block: tl.constexpr):
    """out[r] = image · conj(reference[r]) of one reference and one run of pixels, re and im interleaved."""
    r = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * block + tl.arange(0, block)
    inside = k < pixels
    at = 2 * k
    xr, xi = tl.load(image_ptr + at, mask=inside), tl.load(image_ptr + at + 1, mask=inside)
    reference_ptr += 2 * r * pixels
    ar, ai = tl.load(reference_ptr + at, mask=inside), tl.load(reference_ptr + at + 1, mask=inside)
    out_ptr += 2 * r * pixels
    tl.store(out_ptr + at, xr * ar + xi * ai, mask=inside)
    tl.store(out_ptr + at + 1, xi * ar - xr * ai, mask=inside)


@triton.jit
def _raise(value_ptr, best_ptr, index_ptr, pixels, n, first, block: tl.constexpr):
    """best = max(best, values[r]) over r, index = first + r where that is larger."""
    k = tl.program_id(0) * block + tl.arange(0, block)
    inside = k < pixels
    best = tl.load(best_ptr + k, mask=inside, other=0.0)
    index = tl.load(index_ptr + k, mask=inside, other=0).to(tl.int32)
    at = value_ptr + k
    for r in range(n):
        value = tl.load(at, mask=inside, other=float("-inf"))
        better = value > best
        best = tl.where(better, value, best)
        index = tl.where(better, first + r, index)
        at += pixels
    tl.store(best_ptr + k, best, mask=inside)
    tl.store(index_ptr + k, index.to(tl.int16), mask=inside)


def correlate_max_(images: Tensor, references: Tensor, width: int, best_: Tensor, index_: Tensor, first: int) -> None:
    """See frazil.ops.correlate."""
    b, h, half = images.shape
    n, pixels = len(references), h * width
    most = max(1, BATCH // (3 * best_.element_size() * pixels))
    batch = triton.cdiv(n, triton.cdiv(n, most))  # equal ones: one plan of cuFFT, no small rest
    images = images / pixels  # here and not in every transform, where it is a pass over all values
    product = torch.empty(batch, h, half, dtype=images.dtype, device=images.device)
    stored = torch.view_as_real(references)
    for i in range(b):
        for start in range(0, n, batch):
            count = min(batch, n - start)
            _products[(triton.cdiv(h * half, BLOCK), count)](
                torch.view_as_real(images[i]), stored[start : start + count], torch.view_as_real(product), h * half,
                block=BLOCK, num_warps=4,
            )  # fmt: skip
            values = torch.fft.irfft2(product[:count], s=(h, width), norm="forward")
            _raise[(triton.cdiv(pixels, BLOCK),)](values, best_[i], index_[i], pixels, count, first + start, block=BLOCK, num_warps=4)
