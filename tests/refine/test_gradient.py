"""Gradient steps: schedule, the formulas of spec 5.2 by hand, running means, inactive classes, blobs."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.fourier2d import half_plane_radii, shell_means_of_planes
from frazil.refine import gradient
from frazil.refine.gradient import MOMENTUM, Moments, Schedule, descend, no_moments

M, PAD = 9, 2.0


def random_planes(rng, *shape):
    inside = half_plane_radii(M) <= M - 1
    return torch.randn(*shape, 2 * M + 1, M + 1, dtype=torch.complex128, generator=rng) * inside


def test_schedule_ramps_as_the_reference_says():
    plan = Schedule(200, 100_000)
    assert (plan.start, plan.ramp) == (60, 100)
    assert [plan.batch(i) for i in (1, 60, 110, 160, 199, 200)] == [500, 500, 2750, 5000, 5000, 100_000]
    assert [Schedule(200, 2374).batch(i) for i in (1, 160, 200)] == [200, 1000, 2374]
    assert Schedule(200, 150).batch(1) == 150
    assert [plan.step(i) for i in (1, 85, 200)] == pytest.approx([0.9, 0.6, 0.3], abs=1e-2)
    assert plan.tau_fudge(1, 4) == pytest.approx(1, abs=1e-2) and plan.tau_fudge(73, 4) == pytest.approx(2.5, abs=0.3)
    assert plan.tau_fudge(200, 4) == pytest.approx(4)
    assert not plan.between(59) and plan.between(60) and plan.between(159) and not plan.between(160)
    steps = [plan.step(i) for i in range(1, 201)]
    assert all(a >= b for a, b in zip(steps, steps[1:], strict=False))


def test_step_is_the_formula(rng):
    """Two steps written out with whole arrays, one element at a time where it matters."""
    v, share = random_planes(rng, 2), torch.tensor([0.3, 0.001], dtype=torch.float64)
    moments, plane = no_moments(2, M, v), v
    first = second = None
    for _ in range(2):
        sums = tuple((random_planes(rng, 2), 3 * torch.rand(2, 2 * M + 1, M + 1, dtype=torch.float64, generator=rng)) for _ in (1, 2))
        new, moments, snr, power = descend(plane, (sums[0], sums[1]), moments, share, PAD, 0.7, 1.5)
        g = [b / torch.where(w > 1, w, 1.0) for b, w in sums]
        first = g if first is None else [0.9 * a + 0.1 * b for a, b in zip(first, g, strict=True)]
        change = (g[0] - g[1]).abs() ** 2 / (((g[0] + g[1]) / 2).abs() ** 2 + 1e-12)
        second = (1.0 if second is None else second) * 0.999 + 0.001 * change
        mean = (first[0] + first[1]) / 2
        shells = 1 + (M - 1) // 2
        ratio = 2 * 1.5 * shell_means_of_planes(plane.abs(), PAD, shells) / shell_means_of_planes((first[0] - first[1]).abs(), PAD, shells)
        f = (ratio / (1 + ratio))[:, (half_plane_radii(M) / PAD + 0.5).long().clamp(max=shells - 1)]
        rate = 0.7 * (1 - torch.exp(-16 * share))[:, None, None]
        expected = (plane + rate * (f * mean / (second.sqrt() + 1e-12) - (1 - f) * plane)) * (half_plane_radii(M) <= M - 1)
        assert torch.allclose(new, expected, atol=1e-12) and torch.allclose(snr, ratio)
        assert torch.allclose(power, mean.abs().square().mean((1, 2)))
        assert float((new[1] - plane[1]).norm()) < 0.05 * float((new[0] - plane[0]).norm())  # a small class hardly moves
        plane = new


def test_steps_find_the_least_squares_average(rng):
    """With noiseless data the residual's gradient leads to the average itself: G = W (truth − V)."""
    truth, weight = random_planes(rng, 1), torch.full((1, 2 * M + 1, M + 1), 50.0, dtype=torch.float64)
    plane = torch.zeros_like(truth)
    moments, share = no_moments(1, M, plane), torch.ones(1, dtype=torch.float64)
    distance = []
    for step in range(150):
        plane = plane if step else 1e-3 * truth
        g = weight * (truth - plane)
        jitter = [g + 1e-4 * weight * random_planes(rng, 1) for _ in (1, 2)]
        plane, moments, *_ = descend(plane, ((jitter[0], weight), (jitter[1], weight)), moments, share, PAD, 0.3, 4.0)
        distance.append(float((plane - truth).norm() / truth.norm()))
    assert distance[-1] < 0.01 < distance[0]


def test_moments_outlive_a_change_of_the_window(rng):
    """A wider window later: what was learnt stays in the middle, the rest starts from zero."""
    small, wide = random_planes(rng, 1), gradient.widened(random_planes(rng, 1), 14)
    assert torch.equal(gradient.narrowed(gradient.widened(small, 14), M), small)
    ones = torch.ones(1, 2 * M + 1, M + 1, dtype=torch.float64)
    share = torch.ones(1, dtype=torch.float64)
    _, moments, *_ = descend(small, ((small, ones), (small, ones)), no_moments(1, 14, small), share, PAD, 0.5, 1.0)
    big = torch.ones(1, 29, 15, dtype=torch.float64)
    _, after, *_ = descend(wide, ((0 * wide, big), (0 * wide, big)), moments, share, PAD, 0.5, 1.0)
    assert torch.allclose(gradient.narrowed(after.first[0], M), MOMENTUM * small) and after.begun


def test_inactive_classes():
    share, power = torch.tensor([0.5, 0.001, 0.499]), torch.tensor([1.0, 100.0, 3.0])
    assert gradient.inactive_class(share, power, 0.1) == (1, 2)
    assert gradient.inactive_class(share, power, 0.002) is None
    assert gradient.inactive_class(torch.full((3,), 1 / 3), power, 0.1) is None


def test_blobs_look_like_the_map_they_start_from(rng):
    """Standard deviation of the map, most mass within the particle, other blobs for each class, the same with the same seed."""
    maps = 3 + torch.randn(2, 48, 48, dtype=torch.float64, generator=rng)
    out = gradient.blobs(maps, 30.0, torch.Generator().manual_seed(1))
    assert torch.allclose(out.std((1, 2)), maps.std((1, 2)), rtol=1e-9)
    assert not torch.allclose(out[0] / out[0].max(), out[1] / out[1].max(), atol=0.1)
    line = torch.arange(48) - 24
    inside = (line[:, None] ** 2 + line**2) < 15**2
    assert (out[:, inside].abs().sum() / out.abs().sum()) > 0.9
    assert torch.equal(out, gradient.blobs(maps, 30.0, torch.Generator().manual_seed(1)))


def test_second_moment_starts_at_one(rng):
    moments = no_moments(3, 5, random_planes(rng, 1))
    assert isinstance(moments, Moments) and moments.second.min() == 1 == moments.second.max() and not moments.begun
    assert moments.first.shape == (2, 3, 11, 6) and math.isclose(float(moments.first.abs().max()), 0)
