"""Best correlation on a GPU: two references in one complex transform, and one pass that takes the maximum in registers.

Two real maps c, d with transforms C, D (half planes) are the real and the imaginary part of IFFT[C + iD]. The other half plane is
C(−k) + iD(−k) = conj C(k) + i conj D(k), so what is read once is written twice, and no complex-to-real transform is needed: torch copies
the input of those, as cuFFT overwrites it.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
BATCH = 1 << 30  # bytes of products and correlations at a time


@triton.jit
def _load(ptr, at, mask, other: tl.constexpr):
    """Real and imaginary parts of the complex values at `at`, 8 bytes in one access."""
    return tl.split(tl.load(ptr + (2 * at[:, None] + tl.arange(0, 2)[None, :]), mask=mask[:, None], other=other))


@triton.jit
def _store(ptr, at, re, im, mask):
    """The reverse of _load."""
    tl.store(ptr + (2 * at[:, None] + tl.arange(0, 2)[None, :]), tl.join(re, im), mask=mask[:, None])


@triton.jit
def _products(image_ptr, reference_ptr, out_ptr, height, width, n, block: tl.constexpr):
    """out[p] = C + iD of references 2p and 2p + 1 (D = 0 beyond the last) on the whole plane, from half planes."""
    pair = tl.program_id(1).to(tl.int64)
    half = width // 2 + 1
    pixels = height * half
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < pixels
    xr, xi = _load(image_ptr, at, inside, 0.0)
    ar, ai = _load(reference_ptr + 4 * pair * pixels, at, inside, 0.0)
    br, bi = _load(reference_ptr + (4 * pair + 2) * pixels, at, inside & (2 * pair + 1 < n), 0.0)
    cr, ci = xr * ar + xi * ai, xi * ar - xr * ai
    dr, di = xr * br + xi * bi, xi * br - xr * bi
    y, x = at // half, at % half
    out_ptr += 2 * pair * height * width
    _store(out_ptr, y * width + x, cr - di, ci + dr, inside)
    mirrored = inside & (x > 0) & (2 * x < width)
    _store(out_ptr, ((height - y) % height) * width + width - x, cr + di, dr - ci, mirrored)


@triton.jit
def _raise(value_ptr, best_ptr, index_ptr, pixels, n, first, block: tl.constexpr):
    """best = max(best, values[r]) over r, index = first + r where that is larger; maps 2p and 2p + 1 are re and im of the p-th plane."""
    k = tl.program_id(0) * block + tl.arange(0, block)
    inside = k < pixels
    best = tl.load(best_ptr + k, mask=inside, other=0.0)
    index = tl.load(index_ptr + k, mask=inside, other=0).to(tl.int32)
    for pair in range((n + 1) // 2):
        even, odd = _load(value_ptr, k, inside, float("-inf"))
        odd = tl.where(2 * pair + 1 < n, odd, float("-inf"))
        better = even > best
        best = tl.where(better, even, best)
        index = tl.where(better, first + 2 * pair, index)
        better = odd > best
        best = tl.where(better, odd, best)
        index = tl.where(better, first + 2 * pair + 1, index)
        value_ptr += 2 * pixels
    tl.store(best_ptr + k, best, mask=inside)
    tl.store(index_ptr + k, index.to(tl.int16), mask=inside)


def correlate_max_(images: Tensor, references: Tensor, width: int, best_: Tensor, index_: Tensor, first: int) -> None:
    """See frazil.ops.correlate."""
    b, h, half = images.shape
    n, pixels = len(references), h * width
    most = max(1, BATCH // (6 * best_.element_size() * pixels))  # pairs: product, its transform, what cuFFT needs
    pairs = triton.cdiv(n, 2)
    batch = triton.cdiv(pairs, triton.cdiv(pairs, most))  # equal ones: one plan of cuFFT, no small rest
    images = images / pixels  # here and not in every transform, where it is a pass over all values
    product = torch.empty(batch, h, width, dtype=images.dtype, device=images.device)
    stored = torch.view_as_real(references)
    for i in range(b):
        for start in range(0, n, 2 * batch):
            count = min(2 * batch, n - start)
            planes = product[: triton.cdiv(count, 2)]
            _products[(triton.cdiv(h * half, BLOCK), len(planes))](
                torch.view_as_real(images[i]), stored[start : start + count], torch.view_as_real(planes), h, width, count,
                block=BLOCK, num_warps=4,
            )  # fmt: skip
            values = torch.view_as_real(torch.fft.ifft2(planes, norm="forward"))
            _raise[(triton.cdiv(pixels, BLOCK),)](values, best_[i], index_[i], pixels, count, first + start, block=BLOCK, num_warps=4)
