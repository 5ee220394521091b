"""`compare` and `candidates` on GPUs: Triton for what surrounds the matrix products, torch (cuBLAS) for the products.

Work arrays are bounded by WORK_BYTES; addresses are 64 bit. Runs in Triton's interpreter too (TRITON_INTERPRET=1).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

WORK_BYTES = 1 << 26  # of the factors of `compare`, of the scores of `candidates`, where the memory is small
ALIGN = 16  # inner dimension of a product, elements: what tensor cores want
PIXELS = 512  # a block of the elementwise loops
TILE = 1024  # hypotheses a program of `candidates` looks at
BINS = 128  # of the histogram of L between best − depth and best


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32, or in full float32, inside; the caller's setting is restored."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def floats(x: Tensor) -> Tensor:
    """(n, 2p) view of a complex (n, p) tensor: re, im interleaved."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x).reshape(len(x), -1)


def work_bytes() -> int:
    """Bytes of a work array: 1/64 of the memory this process may use on the GPU, at least WORK_BYTES."""
    if not torch.cuda.is_available():
        return WORK_BYTES
    allowed = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory * torch.cuda.get_per_process_memory_fraction()
    return max(WORK_BYTES, int(allowed) // 64)


@triton.jit
def _multiply_rows(slices, images, power, row_slice, row_image, z, norm, p, unit, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """A program a row: z[r] = [re | im] of conj(S) Y, norm[r] = Σ |S|² Q. A row's slice is row_slice[r // unit] · unit + r % unit."""
    r = tl.program_id(0).to(tl.int64)
    s_at = slices + (tl.load(row_slice + r // unit) * unit + r % unit) * 2 * p
    image = tl.load(row_image + r // unit)
    y_at, q_at, z_at = images + image * 2 * p, power + image * p, z + r * 2 * p
    total = tl.zeros((BLOCK,), power.dtype.element_ty)
    for first in range(0, p, BLOCK):
        j = first + tl.arange(0, BLOCK)
        ok = j < p
        sr, si = tl.load(s_at + 2 * j, mask=ok, other=0.0), tl.load(s_at + 2 * j + 1, mask=ok, other=0.0)
        yr, yi = tl.load(y_at + 2 * j, mask=ok, other=0.0), tl.load(y_at + 2 * j + 1, mask=ok, other=0.0)
        tl.store(z_at + j, sr * yr + si * yi, mask=ok)
        tl.store(z_at + p + j, sr * yi - si * yr, mask=ok)
        total += (sr * sr + si * si) * tl.load(q_at + j, mask=ok, other=0.0)
    tl.store(norm + r, tl.sum(total, 0))


def compare(slices: Tensor, row_slice: Tensor, row_image: Tensor, images: Tensor, power: Tensor, phases: Tensor, cc: bool) -> Tensor:
    """See frazil.ops.compare.compare."""
    return pair_scores(slices, row_slice, row_image, images, power, phases, 1, cc)


def pair_scores(slices: Tensor, pair_slice: Tensor, pair_image: Tensor, images: Tensor, power: Tensor, phases: Tensor, unit: int,
                cc: bool) -> Tensor:
    """(n·unit, T) scores of slices pair_slice·unit … +unit−1 with image pair_image, in any order; see frazil.ops.compare.compare."""
    n, p = len(pair_slice) * unit, slices.shape[1]
    scores = power.new_empty(n, phases.shape[1])
    right = torch.cat([phases.real, -phases.imag])  # (2p, T)
    s, y, q = floats(slices), floats(images), power.contiguous()
    chunk = max(1, min(len(pair_slice), work_bytes() // (2 * p * unit * power.element_size())))
    z, norm = power.new_empty(chunk * unit, 2 * p), power.new_empty(chunk * unit)
    for first in range(0, len(pair_slice), chunk):
        m = min(chunk, len(pair_slice) - first)
        here, part, rows = slice(first, first + m), slice(first * unit, (first + m) * unit), m * unit
        _multiply_rows[(rows,)](s, y, q, pair_slice[here].contiguous(), pair_image[here].contiguous(), z, norm, p, unit, BLOCK=PIXELS)
        with matmul_precision(tf32=False):
            torch.mm(z[:rows], right, out=scores[part])
        column = norm[:rows, None]
        if cc:
            scores[part] *= torch.where(column > 0, column.rsqrt(), 0)
        else:
            scores[part] -= column
    return scores


@triton.jit
def _values(even, odd, prior, norm, shift, row, mate, j, ok, shifts, h):  # noqa: ANN001, ANN202
    """L of the hypotheses j of one mate for row = image·T + shift; −inf outside."""
    x = tl.load(even + row * h + j, mask=ok, other=0.0)
    y = tl.load(odd + row * h + j, mask=ok, other=0.0)
    a = tl.load(prior + mate * h + j, mask=ok, other=float("-inf")) - tl.load(norm + row // shifts * h + j, mask=ok, other=0.0)
    return (tl.where(mate == 0, x + y, x - y) + a) + tl.load(shift + row)


@triton.jit
def _tile_best(even, odd, prior, norm, shift, best, shifts, h, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """best[row, mate, tile] for both mates of a tile and all shifts of an image, which share priors and norms."""
    image, k, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    j = k * BLOCK + tl.arange(0, BLOCK)
    ok = j < h
    q = tl.load(norm + image * h + j, mask=ok, other=0.0)
    a = tl.load(prior + j, mask=ok, other=float("-inf")) - q
    b = tl.load(prior + h + j, mask=ok, other=float("-inf")) - q
    for row in range(image * shifts, (image + 1) * shifts):
        x = tl.load(even + row * h + j, mask=ok, other=0.0)
        y = tl.load(odd + row * h + j, mask=ok, other=0.0)
        c = tl.load(shift + row)
        tl.store(best + row * 2 * tiles + k, tl.max(((x + y) + a) + c, 0))
        tl.store(best + (row * 2 + 1) * tiles + k, tl.max(((x - y) + b) + c, 0))


@triton.jit
def _row_best(best, row, tiles, PLACES: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """The best of a row's tiles of both mates, read at once: most rows hold nothing that matters, and end here."""
    place = tl.arange(0, PLACES)
    return tl.max(tl.load(best + row * 2 * tiles + place, mask=place < 2 * tiles, other=float("-inf")), 0)


@triton.jit
def _histogram(even, odd, prior, norm, shift, best, top, hist, depth, shifts, h, tiles,  # noqa: ANN001, ANN202
               BLOCK: tl.constexpr, N: tl.constexpr, PLACES: tl.constexpr):  # noqa: N803
    """hist[image, (top − L)·N/depth] counts the hypotheses above top − depth. A program a row; most look at its tiles' best only."""
    row = tl.program_id(0).to(tl.int64)
    high = tl.load(top + row // shifts)
    found = _row_best(best, row, tiles, PLACES)
    for place in range(tl.where(found >= high - depth, 2 * tiles, 0)):
        if tl.load(best + row * 2 * tiles + place) >= high - depth:
            j = (place % tiles) * BLOCK + tl.arange(0, BLOCK)
            v = _values(even, odd, prior, norm, shift, row, place // tiles, j, j < h, shifts, h)
            inside = v >= high - depth
            # What lies outside goes to one more bin, which is never read.
            bin = tl.where(inside, tl.minimum((high - tl.where(inside, v, high)) * (N / depth), N - 1.0), N).to(tl.int32)
            counts = tl.histogram(bin, 2 * N)
            at = tl.arange(0, 2 * N)
            tl.atomic_add(hist + (row // shifts) * N + at, counts, mask=(at < N) & (counts > 0))


@triton.jit
def _count(even, odd, prior, norm, shift, best, floor, count, shifts, h, tiles,  # noqa: ANN001, ANN202
           BLOCK: tl.constexpr, PLACES: tl.constexpr):  # noqa: N803
    """count[row] of hypotheses of both mates with L ≥ floor of their image."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(floor + row // shifts)
    total = 0
    for place in range(tl.where(_row_best(best, row, tiles, PLACES) >= low, 2 * tiles, 0)):
        if tl.load(best + row * 2 * tiles + place) >= low:
            j = (place % tiles) * BLOCK + tl.arange(0, BLOCK)
            v = _values(even, odd, prior, norm, shift, row, place // tiles, j, j < h, shifts, h)
            total += tl.sum((v >= low).to(tl.int32), 0)
    tl.store(count + row, total)


@triton.jit
def _list(even, odd, prior, norm, shift, best, floor, start, flat, value, shifts, h, tiles,  # noqa: ANN001, ANN202
          BLOCK: tl.constexpr, PLACES: tl.constexpr):  # noqa: N803
    """Write flat = (row·2 + mate)·h + index, and L, of the counted hypotheses."""
    row = tl.program_id(0).to(tl.int64)
    low, at = tl.load(floor + row // shifts), tl.load(start + row)
    for place in range(tl.where(_row_best(best, row, tiles, PLACES) >= low, 2 * tiles, 0)):
        if tl.load(best + row * 2 * tiles + place) >= low:
            mate = place // tiles
            j = (place % tiles) * BLOCK + tl.arange(0, BLOCK)
            v = _values(even, odd, prior, norm, shift, row, mate, j, j < h, shifts, h)
            ok = v >= low
            put = at + tl.cumsum(ok.to(tl.int32), 0) - 1
            tl.store(flat + put, (row * 2 + mate) * h + j, mask=ok)
            tl.store(value + put, v, mask=ok)
            at += tl.sum(ok.to(tl.int32), 0)


@triton.jit
def _floor(hist, top, floor, left_out, depth, allowed, most, N: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """A program an image: the highest bin edge below which there is surely no more than `allowed` of the mass, and the mass below it.

    Or the highest above which there are `most` hypotheses, if that is higher. +inf for an image without hypotheses.
    """
    image = tl.program_id(0).to(tl.int64)
    n = tl.load(hist + image * N + tl.arange(0, N))
    i, count, width = tl.arange(0, N).to(tl.float64), n.to(tl.float64), depth / N
    total = tl.maximum(tl.sum(count * tl.exp(-(i + 1) * width), 0), 1.0)
    mass = count * tl.exp(-i * width)
    tail = tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass  # of the bins from i on
    k = tl.maximum(tl.sum((tail > allowed * total).to(tl.int32), 0), 1)
    k = tl.minimum(k, tl.sum((tl.cumsum(n, 0) < most).to(tl.int32), 0) + 1)
    tl.store(left_out + image, tl.sum(tl.where(i >= k, count * tl.exp(-(i + 0.5) * width), 0.0), 0))
    high = tl.load(top + image)
    low = (high.to(tl.float64) - k * width).to(high.dtype)
    tl.store(floor + image, tl.where(high == float("-inf"), float("inf"), low))


@triton.jit
def _shift(images, turn, re, im, p, wide, shifts, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """re, im[row] = real and imaginary part of images[row // T] · turn[row % T], zeros from p to `wide`. A program a row and block."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = j < p
    y, t = images + (row // shifts) * 2 * p + 2 * j, turn + (row % shifts) * 2 * p + 2 * j
    yr, yi = tl.load(y, mask=ok, other=0.0), tl.load(y + 1, mask=ok, other=0.0)
    tr, ti = tl.load(t, mask=ok, other=0.0), tl.load(t + 1, mask=ok, other=0.0)
    tl.store(re + row * wide + j, yr * tr - yi * ti, mask=j < wide)
    tl.store(im + row * wide + j, yr * ti + yi * tr, mask=j < wide)


def _floors(given: tuple, tiles: Tensor, depth: float, fraction: float, most: int, cc: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(best, smallest listed L, mass left out) of each image of a batch."""
    even = given[0]
    n, shifts, h = even.shape
    top = tiles.amax((1, 2, 3))
    left_out = torch.zeros(n, dtype=torch.float64, device=top.device)
    if cc or fraction >= 1:
        return top, torch.where(top.isneginf(), torch.inf, top if cc else top - depth), left_out
    hist, floor = torch.zeros(n, BINS, dtype=torch.int32, device=top.device), torch.empty_like(top)
    high = torch.where(top.isneginf(), torch.inf, top)  # nothing comes near that: an image without hypotheses is passed over
    places = triton.next_power_of_2(2 * tiles.shape[3])
    _histogram[(n * shifts,)](*given, tiles, high, hist, depth, shifts, h, tiles.shape[3], BLOCK=TILE, N=BINS, PLACES=places)
    _floor[(n,)](hist, top, floor, left_out, float(depth), 1 - fraction, min(most, (1 << 31) - 1), N=BINS)
    return top, floor, left_out


def _aligned(x: Tensor) -> Tensor:
    """(n, p) real numbers with columns of zeros after them, so that p is a multiple of ALIGN."""
    out = x.new_zeros(len(x), -(-x.shape[1] // ALIGN) * ALIGN)
    out[:, : x.shape[1]] = x
    return out


def candidates(slices: Tensor, images: Tensor, power: Tensor, phases: Tensor, log_prior: Tensor, log_prior_shift: Tensor, depth: float,
               fraction: float, most: int, cc: bool, batch: int | None, tf32: bool) -> tuple[Tensor, ...]:
    """See frazil.ops.compare.candidates: fields of Candidates."""
    (h, p), b, shifts, device = slices.shape, len(images), phases.shape[1], power.device
    batch = max(1, min(b, batch or work_bytes() // (2 * shifts * max(h, p) * power.element_size() or 1)))
    s_re, s_im = (_aligned(part) for part in (slices.real, slices.imag))
    s_power, turn = s_re.square() + s_im.square(), floats(phases.T)
    y, wide = floats(images), s_re.shape[1]
    power, log_prior = _aligned(power), log_prior.contiguous()
    best, left_out = power.new_full((b,), -torch.inf), torch.zeros(b, dtype=torch.float64, device=device)
    found = []
    for first in range(0, b if h else 0, batch):
        part = slice(first, min(first + batch, b))
        n = part.stop - first
        re, im = power.new_empty(2, n * shifts, wide)
        _shift[(n * shifts, triton.cdiv(wide, PIXELS))](y[part], turn, re, im, p, wide, shifts, BLOCK=PIXELS)
        with matmul_precision(tf32):
            even, odd = ((x @ s.T).view(n, shifts, h) for x, s in ((re, s_re), (im, s_im)))
            norm = power[part] @ s_power.T
        del re, im
        if cc:
            scale = torch.where(norm > 0, norm.rsqrt(), 0)[:, None, :]
            even, odd, norm = even * scale, odd * scale, torch.zeros_like(norm)
        given = (even, odd, log_prior, norm, log_prior_shift[part].contiguous())
        grid = (n * shifts, triton.cdiv(h, TILE))
        tiles = power.new_empty(n, shifts, 2, grid[1])
        _tile_best[(n, grid[1])](*given, tiles, shifts, h, BLOCK=TILE)
        best[part], floor, left_out[part] = _floors(given, tiles, depth, fraction, most, cc)
        count = torch.empty(n * shifts, dtype=torch.int32, device=device)
        places = triton.next_power_of_2(2 * grid[1])
        _count[grid[:1]](*given, tiles, floor, count, shifts, h, grid[1], BLOCK=TILE, PLACES=places)
        end = count.cumsum(0, dtype=torch.int64)
        flat = torch.empty(int(end[-1]), dtype=torch.int64, device=device)
        value = power.new_empty(len(flat))
        if len(flat):
            _list[grid[:1]](*given, tiles, floor, end - count, flat, value, shifts, h, grid[1], BLOCK=TILE, PLACES=places)
        image = flat // (2 * h * shifts)
        if cc:  # of equals the first
            once = torch.ones_like(image, dtype=torch.bool)
            once[1:] = image[1:] != image[:-1]
            image, flat, value = image[once], flat[once], value[once]
        found.append((image + first, flat % (2 * h), flat // (2 * h) % shifts, value))
    none = torch.empty(0, dtype=torch.int64, device=device)
    image, hypothesis, shift, value = (torch.cat(x) for x in zip(*found, strict=True)) if found else (none, none, none, power.new_empty(0))
    return image, hypothesis, shift, value, best, left_out
