"""score on a GPU: every shift of every (orientation, image) pair as one product (ops/compare), then the wanted ones are picked."""

from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.compare import compare


def score(slices, orientation, image, shift, log_prior, images, power, phases, children, cc) -> Tensor:  # noqa: ANN001
    """(n, C, c) values; see ops/score. Pairs are taken in chunks so that their table stays under 256 MB."""
    big, small = children
    key = orientation * len(images) + image
    pairs, pair = torch.unique_consecutive(key, return_inverse=True)
    o, i = pairs // len(images), pairs % len(images)
    counts = torch.bincount(pair, minlength=len(pairs)).cumsum(0).tolist()
    out = power.new_empty(len(orientation), big, small)
    step = max(1, (1 << 26) // (big * phases.shape[1]))
    child = torch.arange(big, device=slices.device)
    for a in range(0, len(pairs), step):
        b = min(a + step, len(pairs))
        lo, hi = counts[a - 1] if a else 0, counts[b - 1]
        # Rows (slice, image) must be in the order of slices: child-major within an orientation.
        row_slice = (o[a:b, None] * big + child).reshape(-1)
        order = torch.argsort(row_slice, stable=True)
        value = compare(slices, row_slice[order], i[a:b].repeat_interleave(big)[order], images, power, phases, cc=cc)
        table = torch.empty_like(value)
        table[order] = value
        table = table.reshape(b - a, big, -1, small)
        out[lo:hi] = table[pair[lo:hi] - a, :, shift[lo:hi]]
    return out + log_prior[:, None, None]
