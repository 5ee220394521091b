"""Peaks apart, sub-pixel tops, one-to-one matching: against brute force and by hand."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from frazil.maths import peaks
from frazil.maths.peaks import highest_apart, local_maxima, match_points, refine_peaks, split_level


def test_highest_apart_is_what_one_point_at_a_time_gives(np_rng):
    for _ in range(5):
        points, values = np_rng.uniform(0, 30, (300, 2)), np_rng.normal(size=300).round(1)  # with ties
        kept: list[int] = []
        for i in np.argsort(-values, kind="stable"):
            if all(np.hypot(*(points[i] - points[j])) > 3 for j in kept):
                kept.append(int(i))
        assert highest_apart(points, values, 3.0).tolist() == kept
        assert highest_apart(points, values, 3.0, 7).tolist() == kept[:7]


@pytest.mark.parametrize("kind", ["even", "crowded", "line"])
def test_thinning_by_cells_loses_no_point_that_is_accepted(kind, np_rng, monkeypatch):
    """Against pairs of all points; points in a few cells, and on a line, as well."""
    n = 4000
    points = {"even": np_rng.uniform(0, 300, (n, 2)), "crowded": np.concatenate([np_rng.normal(5, 2, (n - 2, 2)), [[0, 0], [9e4, 7e4]]]),
              "line": np.stack([np_rng.uniform(0, 300, n), np.full(n, 7.0)], -1)}[kind]  # fmt: skip
    values = np_rng.normal(size=n).round(2)  # with ties
    monkeypatch.setattr(peaks, "FEW", n)
    whole = highest_apart(points, values, 4.0)
    monkeypatch.setattr(peaks, "FEW", 50)
    assert highest_apart(points, values, 4.0).tolist() == whole.tolist()
    left = peaks.thinned(torch.from_numpy(points[np.argsort(-values, kind="stable")]), 4.0)
    assert kind == "crowded" or len(left) < 0.5 * n
    assert peaks.thinned(torch.from_numpy(points), 0.0).tolist() == list(range(n))


def test_a_higher_threshold_keeps_the_first_of_the_peaks(np_rng):
    points, values = np_rng.uniform(0, 30, (300, 2)), np_rng.normal(size=300)
    everything = highest_apart(points, values, 3.0)
    high = np.flatnonzero(values > 0.5)
    assert high[highest_apart(points[high], values[high], 3.0)].tolist() == [i for i in everything if values[i] > 0.5]


def test_local_maxima_and_their_tops():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    bump = 5 - (y - 7.3) ** 2 - 0.5 * (x - 15.8) ** 2
    allowed = torch.ones(20, 24, dtype=torch.bool)
    tops = local_maxima(bump, allowed, 0.0)
    assert tops.tolist() == [[7, 16]]
    assert torch.allclose(refine_peaks(bump, tops), torch.tensor([[7.3, 15.8]], dtype=torch.float64), atol=1e-5)
    allowed[7, 16] = False
    assert len(local_maxima(bump, allowed, 0.0)) == 0
    edge = local_maxima(-y - x, torch.ones_like(allowed), -100.0)
    assert edge.tolist() == [[0, 0]] and refine_peaks(-y - x, edge).tolist() == [[0.0, 0.0]]


def test_every_prefix_has_the_largest_matching(np_rng):
    """Against SciPy's assignment, for every number of picks."""
    found, true = np_rng.uniform(0, 10, (25, 2)), np_rng.uniform(0, 10, (18, 2))
    values = np_rng.normal(size=25)
    result = match_points(found, values, true, 1.5)
    order = np.argsort(-values)
    near = np.hypot(*(found[:, None] - true[None]).transpose(2, 0, 1)) <= 1.5
    for n in range(1, 26):
        rows, columns = linear_sum_assignment(-near[order[:n]].astype(float))
        assert result.gains[order[:n]].sum() == near[order[:n]][rows, columns].sum()
    pairs = [(i, j) for i, j in enumerate(result.partner) if j >= 0]
    assert len(pairs) == result.gains.sum() == len({j for _, j in pairs}) and all(near[i, j] for i, j in pairs)


def test_two_picks_on_one_particle_count_once():
    result = match_points(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([1.0, 2.0]), np.array([[0.4, 0.0]]), 2.0)
    assert result.gains.tolist() == [False, True] and result.partner.tolist() == [-1, 0]
    assert match_points(np.zeros((0, 2)), np.zeros(0), np.zeros((3, 2)), 1.0).gains.size == 0


def test_split_level_is_the_best_of_all_levels(np_rng):
    values = np.concatenate([np_rng.normal(0, 0.1, 40), np_rng.normal(1, 0.1, 15)])
    level = split_level(values)
    assert 0.3 < level < 0.8

    def within(t: float) -> float:
        return sum(part.var() * len(part) for part in (values[values < t], values[values >= t]) if len(part))

    assert within(level) == pytest.approx(min(within(a) for a, _ in itertools.pairwise(np.sort(values))))
