"""score by its formula, an entry at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def score(slices, orientation, image, shift, log_prior, images, power, phases, children, cc) -> Tensor:  # noqa: ANN001
    """(n, C, c) values; see ops/score."""
    big, small = children
    out = power.new_empty(len(orientation), big, small)
    for e, (o, i, t) in enumerate(zip(orientation.tolist(), image.tolist(), shift.tolist(), strict=True)):
        s = slices[o * big : (o + 1) * big]
        cross = ((s.conj() * images[i]) @ phases[:, t * small : (t + 1) * small]).real
        norm = (s.abs().square() * power[i]).sum(1, keepdim=True)
        out[e] = (torch.where(norm > 0, cross / norm.clamp(min=1e-30).sqrt(), 0) if cc else cross - norm) + log_prior[e]
    return out
