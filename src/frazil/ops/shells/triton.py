"""Shell powers on a GPU: a program a shell of an image, which gathers the shell's pixels."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 256  # a block


@triton.jit
def _power(values, index, start, out, m, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    image, shell = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = values + image * 2 * m
    total = tl.zeros((BLOCK,), values.dtype.element_ty)
    stop = tl.load(start + shell + 1)
    for first in range(tl.load(start + shell), stop, BLOCK):
        j = first + tl.arange(0, BLOCK)
        ok = j < stop
        pixel = at + 2 * tl.load(index + j, mask=ok, other=0)
        re, im = tl.load(pixel, mask=ok, other=0.0), tl.load(pixel + 1, mask=ok, other=0.0)
        total += re * re + im * im
    tl.store(out + image * tl.num_programs(1) + shell, tl.sum(total, 0).to(tl.float64))


def shell_power(values: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """See frazil.ops.shells. Sums of a shell are in the precision of the values: at most 256 of them a lane."""
    out = torch.empty(len(values), len(start) - 1, dtype=torch.float64, device=values.device)
    if out.numel():
        real = torch.view_as_real(values.resolve_conj().contiguous())
        _power[out.shape](real, index.contiguous(), start.contiguous(), out, values.shape[1], BLOCK=PIXELS)
    return out
