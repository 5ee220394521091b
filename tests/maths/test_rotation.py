"""Euler angles, distances and random rotations (spec/refinement 1.3, 9.1.3)."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frazil.maths.rotation import axis_change, euler_to_matrix, matrix_to_euler, random_rotations, rotation_angle
from frazil.maths.sphere import direction_vectors
from frazil.maths.symmetry import operators


def angles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def passive(axis: int, degrees: float) -> Tensor:
    """Passive rotation about a coordinate axis: the frame turns, coordinates turn back."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out = torch.eye(3, dtype=torch.float64)
    out[i, i], out[j, j], out[i, j], out[j, i] = c, c, s, -s
    return out


def test_euler_is_passive_zyz(rng: torch.Generator) -> None:
    rot, tilt, psi = (torch.rand(3, generator=rng, dtype=torch.float64) * 360 - 180).tolist()
    expected = passive(2, psi) @ passive(1, tilt) @ passive(2, rot)
    torch.testing.assert_close(euler_to_matrix(angles(rot, tilt, psi)), expected, atol=1e-14, rtol=0)


def test_row_three_is_the_viewing_direction(rng: torch.Generator) -> None:
    a = torch.rand(20, 3, generator=rng, dtype=torch.float64) * angles(360, 180, 360)
    torch.testing.assert_close(euler_to_matrix(a)[:, 2], direction_vectors(a[:, :2]), atol=1e-14, rtol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-180, 180), st.one_of(st.sampled_from([0.0, 180.0, 1e-9, 90.0]), st.floats(0, 180)), st.floats(-180, 180))
def test_angles_survive_the_matrix(rot: float, tilt: float, psi: float) -> None:
    matrix = euler_to_matrix(angles(rot, tilt, psi))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-14, rtol=0)
    found = matrix_to_euler(matrix)
    torch.testing.assert_close(euler_to_matrix(found), matrix, atol=2e-7, rtol=0)
    assert -180 < found[0] <= 180 and 0 <= found[1] <= 180 and -180 < found[2] <= 180
    if 1e-3 < tilt < 180 - 1e-3:
        difference = (found - angles(rot, tilt, psi) + 180).remainder(360) - 180
        assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_at_the_poles_all_of_the_turn_is_psi(tilt: float) -> None:
    found = matrix_to_euler(euler_to_matrix(angles(30, tilt, 50)))
    assert found[0] == 0 and abs(found[1] - tilt) < 1e-6
    assert abs(found[2] - (80 if tilt == 0 else 20)) < 1e-6


def test_rotation_angle_is_known_and_modulo_symmetry() -> None:
    a = euler_to_matrix(angles(10, 20, 30))
    b = euler_to_matrix(angles(10, 20, 43))
    assert abs(rotation_angle(a, b) - 13) < 1e-6
    mate = a @ operators("D7")[9]
    assert rotation_angle(mate, b) > 20
    assert abs(rotation_angle(mate, b, operators("D7")) - 13) < 1e-6


def test_axis_change_is_a_mean_over_axes_and_modulo_symmetry() -> None:
    a = euler_to_matrix(angles(10, 20, 30))[None]
    b = euler_to_matrix(angles(10, 20, 36))[None]  # in-plane: two axes move 6 degrees, the third not
    assert abs(axis_change(a @ operators("O")[5], b, operators("O")) - 4) < 1e-6


def test_random_rotations_are_uniform(rng: torch.Generator) -> None:
    r = random_rotations(20000, rng)
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=torch.float64).expand_as(r), atol=1e-13, rtol=0)
    assert (torch.linalg.det(r) > 0.99).all()
    assert r.mean(0).abs().max() < 4 / math.sqrt(3 * 20000)
    # The rotation angle w has density (1 − cos w)/π, so cos w has mean −1/2: trace = 1 + 2 cos w has mean 0, variance 1.
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(trace.mean()) < 4 / math.sqrt(20000) and abs(trace.square().mean() - 1) < 0.05
