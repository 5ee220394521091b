"""From the scores of the fine pass to posterior weights, in the order the sums want them (spec/refinement 2.1, 2.6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.ops.accumulate import EntryWeights
from frazil.ops.compare import significant
from frazil.refine.search import Fine, Pass, Slices


@dataclass(frozen=True)
class Posterior:
    """Γ of the fine samples of n images."""

    gamma: Tensor  # (entries, C, c), 0 for what is not significant
    log_norm: Tensor  # (n,) float64 log Σ w (in the cross-correlation mode: the best correlation)
    best: Tensor  # (n,) flat index of the best sample
    pmax: Tensor  # (n,) float64 its Γ


def posterior(step: Pass, fine: Fine, n: int) -> Posterior:
    """Γ = w / Σ w of every fine sample; those outside the smallest set that holds the wanted fraction become 0 (the sum stays whole)."""
    found = significant(fine.image, fine.value.flatten(1), n, step.engine.fraction)
    if step.engine.cc:  # the single best sample has Γ = 1 (spec 2.8)
        best = found.best[found.best >= 0]
        gamma = torch.zeros_like(fine.value)
        gamma.view(-1)[best] = 1
        value = fine.value.reshape(-1)[best].double()
        owner = fine.image[best // max(1, gamma.shape[1] * gamma.shape[2])]
        return Posterior(gamma, found.log_norm.index_copy(0, owner, value), found.best, (found.best >= 0).to(found.pmax))
    # In double precision up to the difference: values are thousands, and Γ is their exponential.
    shifted = (fine.value.double() - found.log_norm[fine.image, None, None]).to(fine.value.dtype)
    gamma = shifted.exp_().mul_(found.keep.view_as(fine.value))
    return Posterior(gamma, found.log_norm, found.best, found.pmax)


def weighted_rows(fine: Fine, gamma: Tensor, images: int, shifts: int) -> tuple[Slices, Tensor, Tensor, EntryWeights]:
    """(slices with any weight, slice of each row, image of each row, weights): the rows (slice, image) that count, sorted by slice.

    Entries come sorted by orientation and image, so that a row's place is its rank among the pairs of its orientation: no sort.
    """
    children = gamma.shape[1]
    device = gamma.device
    change = (fine.orientation[1:] != fine.orientation[:-1]) | (fine.image[1:] != fine.image[:-1])
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    first = torch.cat([zero, torch.nonzero(change)[:, 0] + 1])
    start = torch.cat([first, torch.full_like(zero, len(gamma))])
    pair_of = torch.cat([zero, change.long()])[: len(gamma)].cumsum(0)
    mass = gamma.new_zeros(len(first), children).index_add_(0, pair_of, gamma.sum(2))
    used = mass > 0
    orientation = fine.orientation[first]
    per_slice = torch.zeros(len(fine.slices) // children, children, dtype=torch.int64, device=device).index_add_(
        0, orientation, used.long()
    )
    running = used.T.reshape(-1).cumsum(0).view(children, -1).T  # a scan of one long row: down columns a GPU takes 300 times as long
    count = running - (running[:1] - used[:1].long())
    opening = torch.searchsorted(orientation, orientation)  # first pair of the same orientation
    before = torch.cat([torch.zeros(1, children, dtype=torch.int64, device=device), count])[opening]
    begin = per_slice.reshape(-1).cumsum(0).reshape_as(per_slice) - per_slice
    pair, child = torch.nonzero(used, as_tuple=True)
    place = (begin[orientation] + count - 1 - before)[pair, child]
    row_pair, row_child = torch.empty_like(pair), torch.empty_like(child)
    row_pair[place], row_child[place] = pair, child
    filled = per_slice.reshape(-1) > 0
    number = filled.long().cumsum(0) - 1
    row_slice = number[orientation[row_pair] * children + row_child]
    full = torch.nonzero(filled)[:, 0]
    slices = Slices(fine.slices.orientation[full], fine.slices.child[full] if fine.slices.child is not None else None)
    return slices, row_slice, fine.image[first][row_pair], EntryWeights(gamma, fine.shift, start, row_pair, row_child, shifts)
