"""Exact distances against SciPy's transform."""
from __future__ import annotations

import pytest
import torch
from scipy.ndimage import distance_transform_edt

from frazil.maths.distance import bounding_box, squared_distance


@pytest.mark.parametrize("reach", [0, 1, 4, 9, 40, 130])  # 130: squares no longer fit 16 bits
def test_distances_are_exact_up_to_the_reach(rng: torch.Generator, reach: int) -> None:
    inside = torch.rand(19, 33, 24, generator=rng) > 0.995
    before = inside.clone()
    exact = torch.from_numpy(distance_transform_edt(~inside.numpy())).square().round().long()
    assert torch.equal(squared_distance(inside, reach).long(), exact.clamp(max=(reach + 1) ** 2))
    assert torch.equal(inside, before)


def test_nothing_inside_is_far_everywhere() -> None:
    assert (squared_distance(torch.zeros(4, 5, 6, dtype=torch.bool), 3) == 16).all()
    with pytest.raises(ValueError, match="negative"):
        squared_distance(torch.zeros(4, 4, 4, dtype=torch.bool), -1)


def test_bounding_box_holds_what_is_inside() -> None:
    inside = torch.zeros(10, 11, 12, dtype=torch.bool)
    inside[3, 4, 5] = inside[6, 4, 9] = True
    assert bounding_box(inside) == (slice(3, 7), slice(4, 5), slice(5, 10))
    assert bounding_box(inside, 4) == (slice(0, 10), slice(0, 9), slice(1, 12))
    with pytest.raises(ValueError, match="no voxel"):
        bounding_box(torch.zeros_like(inside))
