"""`compare`, `candidates` and `significant` on CPUs: Numba for what surrounds the matrix products, torch (MKL) for the products.

Complex arrays are read as floats (re, im interleaved); the work arrays of the products are planar, [re | im]. Work arrays are kept
to a few MB: they stay in cache between the loop that fills them and the product that reads them, and are large enough that
handing over between the two pools of threads (about 50 µs) does not show.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from frazil.ops.dispatch import numba_threads

WORK_BYTES = 8 << 20  # of a chunk of rows of `compare`
SCORE_BYTES = 4 << 20  # of a block of scores of `candidates`
BINS = 128  # of the histogram of L between best − depth and best
NEGLIGIBLE = 0.02  # of the mass that may be left out: what need not be accounted for
LOOSE = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; infinities and NaN keep their meaning
FIXED = {"nnan", "nsz"}  # every pass must form L in one order of operations, or maximum and threshold would disagree


def follow_threads() -> None:
    """Give Numba the threads torch has."""
    numba_threads(numba)


def floats(x: Tensor) -> NDArray:
    """(n, 2p) view of a complex (n, p) tensor: re, im interleaved."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x).reshape(len(x), -1).numpy()


@njit(parallel=True, fastmath=LOOSE, cache=True)
def _multiply_rows(slices, images, power, row_slice, row_image, z, norm):  # noqa: ANN001, ANN202
    """z[r] = [re | im] of conj(S) Y, norm[r] = Σ |S|² Q."""
    n, p = z.shape[0], z.shape[1] // 2
    for r in prange(n):
        s, y, q, out = slices[row_slice[r]], images[row_image[r]], power[row_image[r]], z[r]
        total = norm.dtype.type(0)
        for j in range(p):
            sr, si, yr, yi = s[2 * j], s[2 * j + 1], y[2 * j], y[2 * j + 1]
            out[j] = sr * yr + si * yi
            out[p + j] = sr * yi - si * yr
            total += (sr * sr + si * si) * q[j]
        norm[r] = total


def compare(slices: Tensor, row_slice: Tensor, row_image: Tensor, images: Tensor, power: Tensor, phases: Tensor, cc: bool) -> Tensor:
    """See frazil.ops.compare.compare."""
    follow_threads()
    n, p = len(row_slice), slices.shape[1]
    scores = power.new_empty(n, phases.shape[1])
    right = torch.cat([phases.real, -phases.imag])  # (2p, T)
    chunk = max(16, WORK_BYTES // (2 * p * power.element_size()) // 16 * 16)
    z, norm = power.new_empty(min(chunk, n), 2 * p), power.new_zeros(min(chunk, n))
    s, y, q = floats(slices), floats(images), power.contiguous().numpy()
    rows = row_slice.contiguous().numpy(), row_image.contiguous().numpy()
    for first in range(0, n, chunk):
        m = min(chunk, n - first)
        part = slice(first, first + m)
        _multiply_rows(s, y, q, rows[0][part], rows[1][part], z[:m].numpy(), norm[:m].numpy())
        out, column = scores[part], norm[:m, None]
        if cc:
            torch.mm(z[:m], right, out=out)
            out *= torch.where(column > 0, column.rsqrt(), 0)
        else:
            out.copy_(-column.expand_as(out))
            torch.addmm(out, z[:m], right, out=out)
    return scores


@njit(parallel=True, fastmath=LOOSE, cache=True)
def _shift_images(images, phases, out):  # noqa: ANN001, ANN202
    """out[0 | 1, i, t] = re | im of Y_i ∘ E_t."""
    n, shifts, p = out.shape[1], out.shape[2], out.shape[3]
    for i in prange(n):
        y = images[i]
        for t in range(shifts):
            e, re, im = phases[t], out[0, i, t], out[1, i, t]
            for j in range(p):
                re[j] = y[2 * j] * e[2 * j] - y[2 * j + 1] * e[2 * j + 1]
                im[j] = y[2 * j] * e[2 * j + 1] + y[2 * j + 1] * e[2 * j]


@njit(parallel=True, fastmath=FIXED, cache=True)
def _find_peaks(even, odd, offset, shift, peak):  # noqa: ANN001, ANN202
    """peak[i, mate, j]: the largest L = even ± odd + offset + shift over the shifts.

    Over the shifts, because a maximum of each of many numbers is vectorised, and the maximum of many numbers is not.
    """
    n, shifts, h = even.shape
    for i in prange(n):
        a0, a1, m0, m1 = offset[0, i], offset[1, i], peak[i, 0], peak[i, 1]
        m0[:] = -np.inf
        m1[:] = -np.inf
        for t in range(shifts):
            x, y, c = even[i, t], odd[i, t], shift[i, t]
            for j in range(h):
                m0[j] = max(m0[j], (x[j] + y[j] + a0[j]) + c)
            for j in range(h):
                m1[j] = max(m1[j], (x[j] - y[j] + a1[j]) + c)


@njit(cache=True)
def _bin(top, value, scale):  # noqa: ANN001, ANN202
    """Bin of the histogram, by how far below the best; BINS for what is too far. Without branches, which would be mispredicted."""
    return int(max(0.0, min((top - value) * scale, float(BINS))))


@njit(cache=True)
def _near(peak, low):  # noqa: ANN001, ANN202
    """Hypotheses mate·h + j whose peak reaches low: the only ones looked at again."""
    h, m = peak.shape[1], 0
    found = np.empty(2 * h, np.int64)
    for mate in range(2):
        for j in range(h):
            if peak[mate, j] >= low:
                found[m] = mate * h + j
                m += 1
    return found[:m]


@njit(cache=True)
def _value(even, odd, offset, mate_offset, shift, k):  # noqa: ANN001, ANN202
    """L of hypothesis k, in the order of operations of _find_peaks."""
    j = k - even.shape[0]
    return (even[k] + odd[k] + offset[k]) + shift if j < 0 else (even[j] - odd[j] + mate_offset[j]) + shift


@njit(cache=True)
def _first_bin_out(hist, width, fraction):  # noqa: ANN001, ANN202
    """(k, mass from bin k on): the smallest k such that bins ≥ k surely hold no more than 1 − fraction of the mass."""
    total = 0.0
    for k in range(BINS):
        total += hist[k] * np.exp(-(k + 1) * width)
    allowed, tail, below, k = (1 - fraction) * max(total, 1.0), 0.0, 0.0, BINS
    while k > 1 and tail + hist[k - 1] * np.exp(-(k - 1) * width) <= allowed:
        k -= 1
        tail += hist[k] * np.exp(-k * width)
        below += hist[k] * np.exp(-(k + 0.5) * width)
    return k, below


@njit(cache=True)
def _enough_bins(hist, width, bins, most):  # noqa: ANN001, ANN202
    """(k, mass of bins k … bins): k ≤ bins, the fewest that hold `most` hypotheses."""
    k, listed, below = 0, 0, 0.0
    while k < bins and listed < most:
        listed += hist[k]
        k += 1
    for j in range(k, bins):
        below += hist[j] * np.exp(-(j + 0.5) * width)
    return k, below


@njit(parallel=True, cache=True)
def _choose(even, odd, offset, shift, peak, depth, fraction, most, top, bins, left_out, count):  # noqa: ANN001, ANN202
    """top[i], the number of bins below it that are listed, and count[i], how many hypotheses that is. depth 0: the best one."""
    n, shifts, _ = even.shape
    scale = BINS / max(depth, 1e-30)
    for i in prange(n):
        best = peak[i].max()
        top[i] = best
        if not best > -np.inf:
            continue
        reach, hist = BINS, np.zeros(BINS + 1, np.int64)
        if fraction < 1:  # hypotheses whose peaks are so low that all their shifts together cannot matter are not looked at
            for mate in range(2):
                for v in peak[i, mate]:
                    hist[_bin(best, v, scale)] += 1
            reach, _ = _first_bin_out(hist, 1 / scale, 1 - NEGLIGIBLE * (1 - fraction) / shifts)
            hist[:] = 0
        near = _near(peak[i], best - reach / scale)
        for t in range(shifts):
            x, y, a0, a1, c = even[i, t], odd[i, t], offset[0, i], offset[1, i], shift[i, t]
            for k in near:
                hist[_bin(best, _value(x, y, a0, a1, c, k), scale)] += 1
        bins[i] = BINS
        if depth == 0:
            count[i] = 1
            continue
        if fraction < 1:
            needed, below = _first_bin_out(hist, 1 / scale, 1 - (1 - NEGLIGIBLE) * (1 - fraction))
            bins[i], more = _enough_bins(hist, 1 / scale, needed, most)
            left_out[i] = below + more
        count[i] = hist[:bins[i]].sum()


@njit(parallel=True, cache=True)
def _list(even, odd, offset, shift, peak, depth, top, bins, start, hypothesis, shift_index, value):  # noqa: ANN001, ANN202
    """Write the chosen hypotheses of image i to start[i] … start[i+1], by shift, then hypothesis."""
    n, shifts, _ = even.shape
    scale = BINS / max(depth, 1e-30)
    for i in prange(n):
        place, end, best, last = start[i], start[i + 1], top[i], bins[i]
        if place == end:
            continue
        near = _near(peak[i], best - (last + 1) / scale)  # one bin more than needed: rounding must not lose any
        for t in range(shifts):
            x, y, a0, a1, c = even[i, t], odd[i, t], offset[0, i], offset[1, i], shift[i, t]
            for k in near:
                v = _value(x, y, a0, a1, c, k)
                if _bin(best, v, scale) < last and place < end:
                    hypothesis[place], shift_index[place], value[place] = k, t, v
                    place += 1


@contextmanager
def bf16_products(allow: bool) -> Iterator[None]:
    """float32 matrix products with bfloat16 inputs and float32 sums, where the processor has units for them (AMX, AVX-512 BF16).

    Measured relative error of a score: 2e-3 of the root of its summed squares, 0.05 nats for a particle of usual contrast.
    """
    if not (allow and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def candidates(slices: Tensor, images: Tensor, power: Tensor, phases: Tensor, log_prior: Tensor, log_prior_shift: Tensor, depth: float,
               fraction: float, most: int, cc: bool, batch: int | None, rank_only: bool) -> tuple[Tensor, ...]:
    """See frazil.ops.compare.candidates: fields of Candidates."""
    follow_threads()
    (h, p), b, shifts = slices.shape, len(images), phases.shape[1]
    if batch is None:
        batch = max(8, SCORE_BYTES // (2 * shifts * h * power.element_size() or 1))
    batch = max(1, min(batch, b))
    s_re, s_im = slices.real.contiguous(), slices.imag.contiguous()
    s_power = s_re.square() + s_im.square()
    y, e = floats(images), floats(phases.T)
    work, score = power.new_empty(2, batch, shifts, p), power.new_empty(2, batch, shifts, h)
    peak = power.new_empty(batch, 2, h)
    best, left_out, found = power.new_full((b,), -torch.inf), torch.zeros(b, dtype=torch.float64), []
    for first in range(0, b if h else 0, batch):
        n = min(batch, b - first)
        part = slice(first, first + n)
        _shift_images(y[part], e, work[:, :n].numpy())
        with bf16_products(rank_only):
            for side, s in enumerate((s_re, s_im)):
                torch.mm(work[side, :n].view(n * shifts, p), s.T, out=score[side, :n].view(n * shifts, h))
        norm = power[part] @ s_power.T
        if cc:
            score[:, :n] *= torch.where(norm > 0, norm.rsqrt(), 0)[:, None, :]
            norm = torch.zeros_like(norm)
        given = (score[0, :n].numpy(), score[1, :n].numpy(), (log_prior[:, None, :] - norm).numpy(),
                 log_prior_shift[part].contiguous().numpy(), peak[:n].numpy())
        _find_peaks(*given)
        reach, top = (0.0 if cc else float(depth)), best[part].numpy()
        bins, count = np.zeros(n, np.int64), np.zeros(n, np.int64)
        _choose(*given, reach, float(fraction), most, top, bins, left_out[part].numpy(), count)
        start = np.concatenate([np.zeros(1, np.int64), count.cumsum()])
        place = torch.empty(2, int(start[-1]), dtype=torch.int64)
        value = power.new_empty(int(start[-1]))
        _list(*given, reach, top, bins, start, place[0].numpy(), place[1].numpy(), value.numpy())
        found.append((torch.repeat_interleave(torch.arange(first, first + n), torch.from_numpy(count)), place[0], place[1], value))
    none = torch.empty(0, dtype=torch.int64)
    image, hypothesis, shift, value = (torch.cat(x) for x in zip(*found, strict=True)) if found else (none, none, none, power.new_empty(0))
    return image, hypothesis, shift, value, best, left_out


@njit(cache=True)
def _threshold(value, weight, target):  # noqa: ANN001, ANN202
    """The largest θ with Σ_{value ≥ θ} weight ≥ target, by partition about pivots: no full sort. Works in place."""
    lo, hi, above = 0, len(value), 0.0  # the answer lies in [lo, hi), everything larger weighs `above`
    while True:
        a, b, c = value[lo], value[(lo + hi) // 2], value[hi - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        left, i, right = lo, lo, hi  # [lo, left) > pivot, [left, i) = pivot, [right, hi) < pivot
        larger = equal = 0.0
        while i < right:
            v, w = value[i], weight[i]
            if v < pivot:
                right -= 1
                value[i], weight[i], value[right], weight[right] = value[right], weight[right], v, w
            else:
                if v > pivot:
                    larger += w
                    value[i], weight[i], value[left], weight[left] = value[left], weight[left], v, w
                    left += 1
                else:
                    equal += w
                i += 1
        if left > lo and above + larger >= target:
            hi = left
        elif above + larger + equal >= target or right == hi:
            return pivot
        else:
            above, lo = above + larger + equal, right


@njit(parallel=True, cache=True)
def select(order, start, value, left_out, fraction, limit, keep, log_norm, best, pmax):  # noqa: ANN001, ANN202
    """Fill keep, log_norm, best, pmax: image i has the rows order[start[i]:start[i+1]] (ascending) of value (m, T)."""
    shifts = value.shape[1]
    for i in prange(len(start) - 1):
        rows = order[start[i]:start[i + 1]]
        top, where = -np.inf, -1
        for r in rows:
            for t in range(shifts):
                if value[r, t] > top:
                    top, where = value[r, t], r * shifts + t
        best[i] = where
        if where < 0:
            continue
        v, w, m, total = np.empty(len(rows) * shifts, np.float64), np.empty(len(rows) * shifts, np.float64), 0, left_out[i]
        for r in rows:
            for t in range(shifts):
                if value[r, t] >= top - 40:  # the rest is below 1e-17 of the largest
                    v[m], w[m] = value[r, t], np.exp(np.float64(value[r, t]) - top)
                    total += w[m]
                    m += 1
        log_norm[i], pmax[i] = top + np.log(total), 1 / total
        theta = -np.inf if fraction >= 1 else _threshold(v[:m], w[:m], fraction * total)
        kept = 0
        for r in rows:
            for t in range(shifts):
                keep[r, t] = value[r, t] >= theta and value[r, t] > -np.inf
                kept += keep[r, t]
        if 0 <= limit < kept:
            _limit(rows, value, keep, kept, limit)


@njit(cache=True)
def _limit(rows, value, keep, kept, limit):  # noqa: ANN001, ANN202
    """Keep only the `limit` largest of the kept ones; of equals, the first."""
    place, v, m = np.empty(kept, np.int64), np.empty(kept, np.float64), 0
    for r in rows:
        for t in range(value.shape[1]):
            if keep[r, t]:
                place[m], v[m] = r * value.shape[1] + t, -value[r, t]
                m += 1
    for k in np.argsort(v, kind="mergesort")[limit:]:
        keep[place[k] // value.shape[1], place[k] % value.shape[1]] = False
