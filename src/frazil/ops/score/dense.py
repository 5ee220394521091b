"""score on a GPU: every shift of every (orientation, image) pair as one product with the phases, then the wanted ones are picked."""

from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.compare.triton import pair_scores, work_bytes


def score(slices, orientation, image, shift, log_prior, images, power, phases, children, cc) -> Tensor:  # noqa: ANN001
    """(n, C, c) values; see ops/score. Pairs are taken in chunks whose table of scores fits the work memory."""
    big, small = children
    pairs, pair = torch.unique_consecutive(orientation * len(images) + image, return_inverse=True)
    o, i = pairs // len(images), pairs % len(images)
    out = power.new_empty(len(orientation), big, small)
    step = max(1, work_bytes() // (big * phases.shape[1] * power.element_size()))
    ends = [len(pair)]
    if len(pairs) > step:
        ends = torch.searchsorted(pair, torch.arange(step, len(pairs) + step, step, device=pair.device)).tolist()
    lo = 0
    for n, hi in enumerate(ends):
        a, b = n * step, min((n + 1) * step, len(pairs))
        table = pair_scores(slices, o[a:b], i[a:b], images, power, phases, big, cc).view(b - a, big, -1, small)
        out[lo:hi] = table[pair[lo:hi] - a, :, shift[lo:hi]]
        lo = hi
    return out.add_(log_prior[:, None, None])
