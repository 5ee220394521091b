"""Q-scores of Gaussians of known width."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from frazil.maths.rotation import random_rotations
from frazil.steps.map_transform import spline, transform
from frazil.steps.qscore import POINTS, fibonacci_sphere, own_points, q_scores

BOX, PIXEL = 32, 0.8


def blobs(where: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussians at (n, 3) xyz Å from the first voxel."""
    line = torch.arange(BOX, dtype=torch.float64) * PIXEL
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * sigma**2)) for a, b, c in where]).sum(0)


def expected(sigma: float) -> float:
    """Correlation of exp(−r²/2σ²) with the reference over 0, 0.1 … 2 Å."""
    r = np.arange(0, 2.05, 0.1)
    return float(np.corrcoef(np.exp(-(r**2) / (2 * sigma**2)), np.exp(-(r**2) / (2 * 0.6**2)))[0, 1])


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.6])
def test_a_single_atom_has_the_correlation_of_two_gaussians(sigma):
    where = torch.tensor([[12.1, 13.3, 11.7]], dtype=torch.float64)
    data = blobs(where, sigma)
    for scaled in (data, 7 * data - 3):  # scale and offset do not matter
        assert float(q_scores(spline(scaled), where, PIXEL)) == pytest.approx(expected(sigma), abs=0.01)


def test_noise_and_empty_space_score_nothing(rng):
    where = torch.tensor([[12.0, 12.0, 12.0]], dtype=torch.float64)
    assert math.isnan(float(q_scores(spline(torch.zeros(BOX, BOX, BOX, dtype=torch.float64)), where, PIXEL)))
    many = torch.rand(150, 3, generator=rng, dtype=torch.float64) * 20 + 2
    assert abs(float(q_scores(spline(torch.randn(BOX, BOX, BOX, generator=rng)), many, PIXEL).nanmean())) < 0.1


def test_points_nearer_to_a_neighbour_are_left_out():
    where = np.array([[0.0, 0, 0], [1.5, 0, 0]])
    points, own = own_points(KDTree(where), where[:1], 1.4, fibonacci_sphere(64))
    assert own.all() and points.shape == (1, POINTS, 3)
    assert (np.linalg.norm(points[0] - where[1], axis=1) >= 1.4 - 1e-6).all()
    crowd = np.concatenate([np.zeros((1, 3)), 0.5 * fibonacci_sphere(200)])
    _, own = own_points(KDTree(crowd), crowd[:1], 1.4, fibonacci_sphere(64))
    assert not own.any()


def test_turning_map_and_model_together_changes_little(rng):
    where = torch.rand(60, 3, generator=rng, dtype=torch.float64) * 9 + 8
    data = blobs(where, 0.8)
    turn, centre = random_rotations(1, rng)[0], BOX // 2 * PIXEL
    before = q_scores(spline(data), where, PIXEL)
    after = q_scores(spline(transform(data, turn)), (where - centre) @ turn.T + centre, PIXEL)
    assert abs(float(after.mean() - before.mean())) < 0.01
