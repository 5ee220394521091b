"""Peaks of a map that keep a distance, and how far two sets of points agree one to one (spec/processing 4.6, 4.10).

Peaks are accepted from the highest down, each farther than the distance from all accepted before. So the peaks above a threshold are the
first ones of the peaks above any lower threshold: one search serves every threshold.

Points are matched one to one within a cut-off, as many as possible (maximum bipartite matching):
recall = pairs / true points, false discovery rate = 1 − pairs / points found (Langlois & Frank 2011).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

Array = NDArray[np.float64]
FEW = 2000  # points of which pairs are listed at once
ROUNDS = 8  # by cells at most: points crowded into few cells would need one round each


def local_maxima(values: Tensor, allowed: Tensor, threshold: float) -> Tensor:
    """(n, 2) int64 row, column of the pixels of `values` (H, W) that are allowed, ≥ threshold, no smaller than their 4 neighbours."""
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1), value=-torch.inf)
    h, w = values.shape
    peak = allowed & (values >= threshold)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        peak &= values >= padded[dy : dy + h, dx : dx + w]
    return peak.nonzero()


def highest_apart(points: Array, values: Array, distance: float, most: int | None = None) -> NDArray[np.int64]:
    """Indices of the points (n, 2) accepted from the highest value down, each farther than `distance` from those before, at most `most`.

    In rounds: a point that is the best of all within the distance is accepted, its neighbours drop out. That ends with what one point
    at a time would give; equal values go by their place in the list.
    """
    order = np.argsort(-values, kind="stable")
    if distance <= 0 or len(order) < 2:
        return order[:most]
    if len(order) > FEW:
        order = order[thinned(torch.from_numpy(points[order]), distance).numpy()]
    pairs = KDTree(points[order]).query_pairs(distance, output_type="ndarray")  # (first, second) by rank
    better, worse = pairs.min(1), pairs.max(1)
    undecided = np.ones(len(order), dtype=bool)
    accepted = np.zeros(len(order), dtype=bool)
    while undecided.any():
        beaten = np.zeros(len(order), dtype=bool)
        beaten[worse] = True
        new = undecided & ~beaten
        accepted |= new
        undecided &= ~new
        undecided[worse[new[better]]] = False
        live = undecided[better] & undecided[worse]
        better, worse = better[live], worse[live]
    return order[accepted][:most]


def thinned(points: Tensor, distance: float) -> Tensor:
    """(m,) rising indices of the points (n, 2) float64, best first, that highest_apart may accept: all that it does, and few others.

    By cells and on any device: whoever is nearer than a cell's width lies in one of nine cells, so the best of nine cells is accepted,
    and what is near it drops out. No pairs are listed: noise has peaks by the ten thousand, a micrograph without low-pass by the million.
    """
    n = len(points)
    left = torch.arange(n, device=points.device)
    if n <= FEW or distance <= 0:
        return left
    points = points - points.amin(0)
    extent = points.amax(0).tolist()
    width = max(distance, math.sqrt(extent[0] * extent[1] / n), max(extent) / n)  # about as many cells as points at most
    h, w = (int(side / width) + 3 for side in extent)  # with a margin of empty cells
    y, x = points.T.contiguous()
    place = ((y / width).long() + 1) * w + (x / width).long() + 1
    kept = torch.zeros(n, dtype=torch.bool, device=points.device)
    for _ in range(ROUNDS):
        if len(left) <= FEW:
            break
        best = torch.full((h * w,), n, device=points.device).scatter_reduce_(0, place[left], left, "amin")
        grid = torch.nn.functional.pad(best.reshape(h, w), (1, 1, 1, 1), value=n)
        rows = torch.minimum(torch.minimum(grid[:-2], grid[1:-1]), grid[2:])
        around = torch.minimum(torch.minimum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]).reshape(-1)
        new = best[(best == around) & (best < n)]
        kept[new] = True
        middle_y, middle_x = torch.full((2, h * w), math.inf, dtype=points.dtype, device=points.device)
        middle_y[place[new]], middle_x[place[new]] = y[new], x[new]
        here, at_y, at_x = place[left], y[left], x[left]
        near = torch.zeros(len(left), dtype=torch.bool, device=points.device)
        for step in (-w - 1, -w, -w + 1, -1, 0, 1, w - 1, w, w + 1):
            cell = here + step
            away = middle_y.index_select(0, cell).sub_(at_y).square_() + middle_x.index_select(0, cell).sub_(at_x).square_()
            near |= away <= distance**2
        left = left[~near]
    kept[left] = True
    return kept.nonzero()[:, 0]


def refine_peaks(values: Tensor, peaks: Tensor) -> Tensor:
    """(n, 2) float64 row, column of peaks (n, 2), moved by at most half a pixel to the top of a parabola through the neighbours."""
    h, w = values.shape
    y, x = peaks.unbind(-1)
    centre = values[y, x].double()
    out = []
    for place, size, before, after in (
        (y, h, values[(y - 1).clamp(min=0), x], values[(y + 1).clamp(max=h - 1), x]),
        (x, w, values[y, (x - 1).clamp(min=0)], values[y, (x + 1).clamp(max=w - 1)]),
    ):
        before, after = before.double(), after.double()
        bend = before + after - 2 * centre
        inside = (place > 0) & (place < size - 1) & (bend < 0) & torch.isfinite(bend)
        offset = torch.where(inside, 0.5 * (before - after) / torch.where(inside, bend, -1.0), torch.zeros_like(centre))
        out.append(place + offset.clamp(-0.5, 0.5))
    return torch.stack(out, -1)


def split_level(values: Array) -> float:
    """The level that parts values into two groups so that the variance within them is least (Otsu 1979); the middle between the groups."""
    v = np.sort(np.asarray(values, dtype=float))
    if len(v) < 2:
        return float(v[0]) if len(v) else 0.0
    k = np.arange(1, len(v))
    low, total = np.cumsum(v)[:-1] / k, v.sum()
    high = (total - np.cumsum(v)[:-1]) / (len(v) - k)
    best = int((k * (len(v) - k) * (high - low) ** 2).argmax())
    return float(0.5 * (v[best] + v[best + 1]))


@dataclass(frozen=True)
class Matching:
    """How n points found pair with m true ones."""

    partner: NDArray[np.int64]  # (n,) index of the true point of each point found, −1: none
    gains: NDArray[np.bool_]  # (n,) whether the pairs become one more when this point joins those of higher value
    distance: Array  # (n,) to the partner, NaN where there is none


def match_points(found: Array, values: Array, true: Array, cutoff: float) -> Matching:
    """The largest one-to-one matching of found (n, 2) to true (m, 2) points at most `cutoff` apart.

    Points join from the highest value down and each is paired along an augmenting path where one exists, nearest partners first. So the
    pairs among the k highest are the largest matching of those k, for every k: `gains` summed gives the whole curve.
    """
    n, m = len(found), len(true)
    partner, taken = np.full(n, -1, dtype=np.int64), np.full(m, -1, dtype=np.int64)
    gains = np.zeros(n, dtype=bool)
    if n and m:
        near = KDTree(true).query_ball_point(found, cutoff)
        near = [sorted(found_near, key=lambda j, i=i: float(np.hypot(*(found[i] - true[j])))) for i, found_near in enumerate(near)]
        for i in np.argsort(-values, kind="stable"):
            gains[i] = _augment(int(i), near, partner, taken)
    distance = np.full(n, np.nan)
    paired = partner >= 0
    distance[paired] = np.hypot(*(found[paired] - true[partner[paired]]).T)
    return Matching(partner, gains, distance)


def _augment(start: int, near: list[list[int]], partner: NDArray[np.int64], taken: NDArray[np.int64]) -> bool:
    """Pair point `start`, moving others to different partners where needed (breadth first); whether that was possible."""
    reached: dict[int, int] = {}  # true point → point found from which it was reached
    queue = [start]
    for i in queue:
        for j in near[i]:
            if j in reached:
                continue
            reached[j] = i
            if taken[j] >= 0:
                queue.append(int(taken[j]))
                continue
            while True:  # walk back, swapping partners
                owner = reached[j]
                former = int(partner[owner])
                partner[owner], taken[j] = j, owner
                if owner == start:
                    return True
                j = former
    return False
