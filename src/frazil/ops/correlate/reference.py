"""Best correlation, one reference at a time, any dtype, any device: the definition."""
from __future__ import annotations

import torch
from torch import Tensor


def correlate_max_(images: Tensor, references: Tensor, width: int, best_: Tensor, index_: Tensor, first: int) -> None:
    """See frazil.ops.correlate."""
    for r, reference in enumerate(references):
        value = torch.fft.irfft2(images * reference.conj(), s=(images.shape[1], width))
        better = value > best_
        best_[better] = value[better]
        index_[better] = first + r
