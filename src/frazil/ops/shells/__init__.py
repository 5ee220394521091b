"""Power of transforms by shell, Σ|X|² over lists of pixels: the noise spectrum's and the norm correction's (spec/refinement 1.1, 3.8)."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def shell_power(values: Tensor, index: Tensor, start: Tensor, *, implementation: str | None = None) -> Tensor:
    """(b, s) float64: Σ |values[i, index[j]]|² over j from start[r] to start[r + 1].

    values (b, m) complex; index (p,) int64 in [0, m), shell by shell; start (s + 1,) int64, ascending from 0 to p.
    Raises ValueError for shapes or types that do not fit and, in main memory, for an index out of range.
    """
    if values.ndim != 2 or not values.is_complex() or index.ndim != 1 or start.ndim != 1 or {index.dtype, start.dtype} != {torch.int64}:
        raise ValueError(f"shell_power: values (b, m) complex, index and start int64 expected, got {tuple(values.shape)} {values.dtype}, "
                         f"{tuple(index.shape)} {index.dtype}, {tuple(start.shape)} {start.dtype}")  # fmt: skip
    if values.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < values.shape[1]:
        raise ValueError(f"shell_power: an index is out of [0, {values.shape[1]})")
    if pick(values, implementation, op="shells") == "triton":
        from .triton import shell_power as run
    else:
        from .reference import shell_power as run
    return run(values, index, start)
