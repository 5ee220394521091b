"""Symmetry axes and point groups of phantoms in any orientation."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frazil.maths.rotation import random_rotations
from frazil.maths.symmetry import operators
from frazil.simulate.phantom import density, phantom
from frazil.steps.map_symmetry import find_symmetry
from frazil.steps.map_transform import symmetrise, transform


@pytest.mark.parametrize("group, highest", [("C1", 3), ("C3", 3), ("D2", 3), ("O", 4)])
def test_the_group_and_its_setting_are_found(rng, group, highest):
    shape, turn = phantom(40, 4.0, group, seed=3), random_rotations(1, rng)[0]
    by = torch.tensor([5.0, -7.0, 3.0], dtype=torch.float64)
    data = density(replace(shape, centre=shape.centre @ turn.T + by), 40, 4.0).data
    noisy = data + 0.3 * data.std() * torch.randn(data.shape, generator=rng)
    found = find_symmetry(noisy, max_order=highest, threshold=0.5)
    assert found.group == group
    assert max((axis.order for axis in found.axes), default=1) == {"C1": 1, "C3": 3, "D2": 2, "O": 4}[group]
    if group == "C1":
        return
    if group != "C3":  # along a single axis the centre is free
        assert (found.centre - by / 4).abs().max() < 0.1
    moved = transform(data, found.rotation, (-found.rotation @ found.centre).tolist())
    assert float((symmetrise(moved, operators(group)) - moved).norm() / moved.norm()) < 0.1
