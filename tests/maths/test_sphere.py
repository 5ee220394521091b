"""Sampling of orientations and shifts (spec/refinement 2.9, 6.1, 9.1.8, 9.1.12)."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.rotation import euler_to_matrix, rotation_angle
from frazil.maths.sphere import (
    angular_step,
    direction_vectors,
    directions,
    fine_shifts,
    next_perturbation,
    perturbation_matrix,
    psi_angles,
    shift_grid,
)

DEGREES = [60, 30, 15, 7.5, 3.75, 1.875, 0.9375, 0.46875, 0.234375]


def test_angular_steps_are_those_of_the_table() -> None:
    assert [angular_step(o) for o in range(9)] == DEGREES


def test_the_twelve_base_pixels() -> None:
    rot, tilt = directions(0).T
    z = torch.cos(torch.deg2rad(tilt))
    expected = torch.tensor([2 / 3] * 4 + [0.0] * 4 + [-2 / 3] * 4, dtype=torch.float64)
    torch.testing.assert_close(z, expected, atol=1e-12, rtol=0)
    assert rot.tolist() == pytest.approx([45, 135, -135, -45, 0, 90, 180, -90, 45, 135, -135, -45])


def test_first_pixels_of_order_one_in_nest_numbering() -> None:
    """NEST: pixel 0 of a base pixel is its southern child, 3 its northern one (Gorski et al. 2005, figure 4)."""
    z = torch.cos(torch.deg2rad(directions(1)[:4, 1]))
    assert z.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 11 / 12])
    assert directions(1)[:4, 0].tolist() == pytest.approx([45, 67.5, 22.5, 45])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_pixels_have_equal_area_and_rot_is_in_range(order: int) -> None:
    angles = directions(order)
    assert len(angles) == 12 * 4**order
    assert angles[:, 0].min() > -180 and angles[:, 0].max() <= 180
    v = direction_vectors(angles)
    second = torch.einsum("ni,nj->ij", v, v) / len(v)  # that of an even sphere: 1/3 on the diagonal
    torch.testing.assert_close(second, torch.eye(3, dtype=torch.float64) / 3, atol=2 * angular_step(order) ** 2 * 1e-5, rtol=0)
    nearest = (torch.rand(40000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1)
    nearest = torch.nn.functional.normalize(nearest[nearest.norm(dim=1) < 1])
    spread = torch.rad2deg(torch.acos((nearest @ v.T).amax(1)))
    assert spread.max() < 1.1 * angular_step(order)


def test_children_lie_in_their_parent() -> None:
    parents, children = direction_vectors(directions(2)), direction_vectors(directions(3))
    families = children.reshape(192, 4, 3)
    mean = torch.nn.functional.normalize(families.mean(1))
    assert torch.rad2deg(torch.acos((mean * parents).sum(-1).clamp(max=1))).max() < 0.12 * angular_step(2)


def test_psi_grid_has_the_opposite_of_every_angle() -> None:
    for step in (15.0, 7.5, 7.1, 11.3):
        psi = psi_angles(step)
        assert len(psi) % 2 == 0 and 360 / len(psi) <= step + 1e-9
        opposite = (psi + 180) % 360
        assert torch.allclose(opposite.sort().values, psi, atol=1e-9)
    assert len(psi_angles(15.0)) == 24 and len(psi_angles(7.1)) == 52


def test_perturbation_is_one_rigid_rotation() -> None:
    grid = euler_to_matrix(torch.cat([directions(1), torch.zeros(48, 1, dtype=torch.float64)], 1))
    turn = perturbation_matrix(0.3, 2)
    torch.testing.assert_close(turn, euler_to_matrix(torch.full((3,), 4.5, dtype=torch.float64)))
    moved = grid @ turn
    before, after = rotation_angle(grid[:, None], grid[None]), rotation_angle(moved[:, None], moved[None])
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)
    assert (rotation_angle(moved, grid) - rotation_angle(turn, torch.eye(3, dtype=torch.float64))).abs().max() < 1e-6


def test_perturbed_slices_keep_their_opposite() -> None:
    """psi + 180 is the same plane turned in itself, so its slice is the complex conjugate, perturbed or not."""
    a = torch.tensor([[20.0, 70.0, 15.0], [20.0, 70.0, 195.0]], dtype=torch.float64)
    one, other = euler_to_matrix(a) @ perturbation_matrix(0.4, 2)
    torch.testing.assert_close(one[:2], -other[:2])
    torch.testing.assert_close(one[2], other[2])


def test_perturbation_walk_stays_in_range_and_moves_by_half_to_whole_factor(rng: torch.Generator) -> None:
    value, seen = 0.0, []
    for _ in range(500):
        new = next_perturbation(value, 0.5, rng)
        step = (new - value) % 1.0
        assert -0.5 <= new <= 0.5 and 0.25 - 1e-12 <= step <= 0.5 + 1e-12
        value = new
        seen.append(new)
    assert min(seen) < -0.45 and max(seen) > 0.45
    assert next_perturbation(0.3, 0.0, rng) == 0.0


def test_shift_grid_is_the_disc_and_its_border() -> None:
    grid = shift_grid(5.0, 2.0)
    assert len(grid) == 21 and (grid.norm(dim=1) <= 5).all()
    assert len(shift_grid(4.0, 2.0)) == 13  # |t| = range belongs to it
    assert len(shift_grid(0.0, 1.0)) == 1


def test_fine_shifts_fill_the_cell() -> None:
    coarse = torch.tensor([[4.0, -2.0]], dtype=torch.float64)
    fine = fine_shifts(coarse, 2.0, 1)
    assert sorted(map(tuple, (fine[0] - coarse[0]).tolist())) == [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]
    assert fine[0, 1, 0] > fine[0, 0, 0] and fine[0, 1, 1] == fine[0, 0, 1]  # x is the fast index
    torch.testing.assert_close(fine_shifts(coarse, 2.0, 2).mean(1), coarse)
    assert math.isclose(float(fine_shifts(coarse, 2.0, 0).sub(coarse[:, None]).abs().max()), 0.0)
