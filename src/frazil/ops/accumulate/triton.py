"""`accumulate` on GPUs: torch (cuBLAS) for A = Γ E in chunks of rows, one Triton kernel for everything else.

A program takes a *piece* (consecutive rows of one slice) and a block of pixels, keeps D, W, x and q in registers over the rows and
writes them once. A slice that is one piece of its chunk is added to without atomics, so the result is the same every time; only
slices with more than PIECE rows in a chunk meet in float32 atomics.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frazil.ops.accumulate import EntryWeights
from frazil.ops.compare.triton import floats, matmul_precision, work_bytes

PIXELS = 256  # a block
PIECE = 64  # rows at most


@triton.jit
def _fold(a_rows, gamma, row_image, slices, masked, gain, unmasked, inverse, use, slice_class, piece_slice, piece_start, alone,  # noqa: ANN001, ANN202
          data, weight, piece_x, piece_q, part, p, BLOCK: tl.constexpr):  # noqa: N803
    piece, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    ok = j < p
    k = tl.load(piece_slice + piece)
    sr = tl.load(slices + k * 2 * p + 2 * j, mask=ok, other=0.0)
    si = tl.load(slices + k * 2 * p + 2 * j + 1, mask=ok, other=0.0)
    norm, m = sr * sr + si * si, tl.load(use + tl.load(slice_class + k) * p + j, mask=ok, other=0.0)
    dr, di, w = tl.zeros_like(sr), tl.zeros_like(sr), tl.zeros_like(sr)
    xs, qs = tl.zeros_like(sr), tl.zeros_like(sr)
    for r in range(tl.load(piece_start + piece), tl.load(piece_start + piece + 1)):
        i, g = tl.load(row_image + r), tl.load(gamma + r)
        ar, ai = tl.load(a_rows + r * 2 * p + j, mask=ok, other=0.0), tl.load(a_rows + r * 2 * p + p + j, mask=ok, other=0.0)
        at = i * 2 * p + 2 * j
        ur, ui = tl.load(unmasked + at, mask=ok, other=0.0), tl.load(unmasked + at + 1, mask=ok, other=0.0)
        fr, fi = tl.load(masked + at, mask=ok, other=0.0), tl.load(masked + at + 1, mask=ok, other=0.0)
        dr += ar * ur - ai * ui
        di += ar * ui + ai * ur
        w += g * tl.load(inverse + i * p + j, mask=ok, other=0.0)
        x = sr * (fr * ar - fi * ai) + si * (fr * ai + fi * ar)
        q = g * norm * tl.load(gain + i * p + j, mask=ok, other=0.0)
        xs += x
        qs += q
        out = part + (r * blocks + block) * 4
        tl.store(out, tl.sum(x, 0))
        tl.store(out + 1, tl.sum(q, 0))
        tl.store(out + 2, tl.sum(x * m, 0))
        tl.store(out + 3, tl.sum(q * m, 0))
    tl.store(piece_x + piece * p + j, xs, mask=ok)
    tl.store(piece_q + piece * p + j, qs, mask=ok)
    d_at, w_at = data + k * 2 * p + 2 * j, weight + k * p + j
    if tl.load(alone + piece) != 0:
        tl.store(d_at, tl.load(d_at, mask=ok) + dr, mask=ok)
        tl.store(d_at + 1, tl.load(d_at + 1, mask=ok) + di, mask=ok)
        tl.store(w_at, tl.load(w_at, mask=ok) + w, mask=ok)
    else:
        tl.atomic_add(d_at, dr, mask=ok)
        tl.atomic_add(d_at + 1, di, mask=ok)
        tl.atomic_add(w_at, w, mask=ok)


def _pieces(row_slice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(slice, start of each piece and the end, whether it is the only piece of its slice) of ascending rows."""
    name, length = row_slice.unique_consecutive(return_counts=True)
    number = (length + PIECE - 1) // PIECE
    owner = torch.repeat_interleave(torch.arange(len(name), device=name.device), number)
    nth = torch.arange(len(owner), device=name.device) - (number.cumsum(0) - number)[owner]
    start = (length.cumsum(0) - length)[owner] + nth * PIECE
    return name[owner], torch.cat([start, start.new_full((1,), len(row_slice))]), (number[owner] == 1).int()


def accumulate(slices: Tensor, row_slice: Tensor, row_image: Tensor, weights: Tensor | EntryWeights, phases: Tensor, masked: Tensor,
               gain: Tensor, unmasked: Tensor, inverse: Tensor, scale_pixels: Tensor,
               slice_class: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See frazil.ops.accumulate: (D, W, Σ_rows x (p,), Σ_rows q (p,), rows)."""
    n, p = len(row_slice), slices.shape[1]
    right = torch.cat([phases.real.T, phases.imag.T], 1)  # (T, 2p): A is planar, [re | im]
    data, weight = torch.zeros_like(slices.resolve_conj(), memory_format=torch.contiguous_format), gain.new_zeros(slices.shape)
    pixels, rows = torch.zeros(2, p, dtype=torch.float64, device=gain.device), gain.new_empty(n, 4)
    chunk = max(1, min(n, work_bytes() // (4 * p * gain.element_size())))
    a, blocks = gain.new_empty(chunk, 2 * p), triton.cdiv(p, PIXELS)
    fixed = (floats(slices), floats(masked), gain.contiguous(), floats(unmasked), inverse.contiguous(), scale_pixels.to(gain).contiguous(),
             slice_class.contiguous())
    for first in range(0, n, chunk):
        here = slice(first, min(first + chunk, n))
        m = here.stop - first
        table = weights[here].dense() if isinstance(weights, EntryWeights) else weights[here]
        with matmul_precision(tf32=False):
            torch.mm(table, right, out=a[:m])
        name, start, alone = _pieces(row_slice[here])
        sums, part = gain.new_empty(2, len(name), p), gain.new_empty(m, blocks, 4)
        _fold[(len(name), blocks)](a, table.sum(1), row_image[here].contiguous(), *fixed, name, start, alone,
                                   torch.view_as_real(data), weight, sums[0], sums[1], part, p, BLOCK=PIXELS)
        pixels += sums.sum(1, dtype=torch.float64)
        torch.sum(part, 1, out=rows[here])
    return data, weight, pixels[0], pixels[1], rows
