"""Best correlation of images with many references, over the references (spec/processing 4.5, 4.12).

    best[b, y, x] = max_r Σ_(v,u) image_b[y + v, x + u] · reference_r[v, u],      index[b, y, x] = the r of that maximum

from half transforms of equal size (the sums wrap round): C = irfft2(X · conj(A)). README.md says what it costs.
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def correlate_max_(
    images: Tensor, references: Tensor, width: int, best_: Tensor, index_: Tensor, *, first: int = 0, implementation: str | None = None
) -> None:
    """Raise `best_` (b, H, W) to the largest correlation with any of the references, and note which in `index_` (b, H, W) int16.

    images (b, H, W//2+1) and references (r, H, W//2+1): rfft2 of real arrays (H, W), W = `width`, complex64 or complex128; `best_` is of
    the real type of that. `first` is the number of references[0]: references may come in several calls. Values of best_ on entry stand
    unless a reference is better (start with −inf), the earlier reference among equals. Raises ValueError for what does not fit.
    """
    b, h, half = images.shape if images.ndim == 3 else (0, 0, 0)
    if images.ndim != 3 or references.ndim != 3 or references.shape[1:] != (h, half) or half != width // 2 + 1:
        shapes = f"{tuple(images.shape)} and {tuple(references.shape)}"
        raise ValueError(f"correlate: images and references {shapes} are no half transforms of width {width}")
    if not images.is_complex() or references.dtype != images.dtype or best_.dtype != images.real.dtype or index_.dtype != torch.int16:
        kinds = ", ".join(str(t.dtype) for t in (images, references, best_, index_))
        raise ValueError(f"correlate: the types of images, references, best and index do not fit: {kinds}")
    if best_.shape != (b, h, width) or index_.shape != (b, h, width) or not best_.is_contiguous() or not index_.is_contiguous():
        shapes = f"{tuple(best_.shape)} and {tuple(index_.shape)}"
        raise ValueError(f"correlate: best and index must be contiguous {(b, h, width)}, got {shapes}")
    if not images.device == references.device == best_.device == index_.device:
        raise ValueError("correlate: images, references, best and index must be on one device")
    if first < 0 or first + len(references) > 2**15:
        raise ValueError(f"correlate: references {first} to {first + len(references)} cannot be numbered in 16 bits")
    if not len(references) or not b:
        return
    match pick(images, implementation, op="correlate"):
        case "triton":
            from .triton import correlate_max_ as run
        case "cpu":
            from .cpu import correlate_max_ as run
        case _:
            from .reference import correlate_max_ as run
    run(images.contiguous(), references.contiguous(), width, best_, index_, first)
