"""Beam-shift clusters."""
from __future__ import annotations

import numpy as np

from frazil.maths.clusters import cluster_shifts


def test_the_pattern_of_holes_is_found(np_rng: np.random.Generator) -> None:
    holes = np.array([(x, y) for x in range(3) for y in range(3)], float)
    which = np_rng.integers(0, 9, 300)
    found = cluster_shifts(holes[which] + 0.03 * np_rng.standard_normal((300, 2)))
    assert found.max() == 8 and found[0] == 0
    assert all(len(set(found[which == k])) == 1 for k in range(9))
    assert len(set(cluster_shifts(holes[which], count=3))) == 3


def test_one_cloud_is_one_group(np_rng: np.random.Generator) -> None:
    assert cluster_shifts(np_rng.standard_normal((100, 2))).max() == 0
    assert cluster_shifts(np.zeros((10, 2))).max() == 0
