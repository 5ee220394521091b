"""Alignment of maps with known orientation, shift and hand."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frazil.maths.rotation import random_rotations, rotation_angle
from frazil.simulate.phantom import density, phantom
from frazil.steps.align import Candidates, align, gauss_newton, hand_matrix, look_up, look_up_table, target_samples, whiten
from frazil.steps.map_transform import transform

PIXEL = 3.0


def pair(box: int, rng: torch.Generator, mirrored: bool, reach: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, moving, rotation, shift in px): moving is made in closed form, so nothing was interpolated."""
    shape, turn = phantom(box, PIXEL, seed=3), random_rotations(1, rng)[0]
    by = (torch.rand(3, generator=rng, dtype=torch.float64) - 0.5) * 2 * reach
    moving = replace(shape, centre=(shape.centre - by * PIXEL) @ turn @ hand_matrix(mirrored))
    return density(shape, box, PIXEL).data, density(moving, box, PIXEL).data, turn, by


@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_shift_and_hand_are_found(rng, mirrored):
    target, moving, turn, by = pair(32, rng, mirrored, 3.0)
    noise = [0.15 * target.std() * torch.randn(target.shape, generator=rng) for _ in range(2)]
    found = align(target + noise[0], moving + noise[1])
    assert found.mirrored == mirrored
    assert rotation_angle(found.rotation, turn) < 0.2 and (found.shift - by).norm() < 0.1
    assert found.correlation > 1.5 * found.other_hand
    back = transform(moving, found.matrix, found.shift.tolist())
    assert float((back - target).norm() / target.norm()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_bar_of_128_px(seed):
    target, moving, turn, by = pair(128, torch.Generator().manual_seed(seed), seed == 2, 15.0)
    found = align(target, moving)
    assert found.mirrored == (seed == 2)
    assert rotation_angle(found.rotation, turn) < 0.2 and (found.shift - by).norm() < 0.1


def test_one_hand_only_and_a_limited_shift(rng):
    target, moving, turn, _ = pair(32, rng, False, 2.0)
    found = align(target, moving, both_hands=False, max_shift=4.0)
    assert math.isnan(found.other_hand) and rotation_angle(found.rotation, turn) < 1.0
    with pytest.raises(ValueError, match="boxes differ"):
        align(target, moving[:30, :30, :30])


@pytest.mark.parametrize("mirrored", [False, True])
def test_gauss_newton_steps_towards_the_truth(rng, mirrored):
    """From 3° and half a pixel away three steps lead to the truth: the signs of all six derivatives are right."""
    target, moving, turn, by = pair(40, rng, mirrored, 3.0)
    samples, table = target_samples(whiten(target), 8), look_up_table(whiten(moving), 9)
    off = random_rotations(1, rng)[0]
    spin = torch.matrix_exp(math.radians(3.0) * (off - off.T) / (off - off.T).norm() * math.sqrt(2))
    some = Candidates((spin @ turn)[None], (by + 0.3)[None], torch.zeros(1))
    hand = hand_matrix(mirrored)
    first = gauss_newton(samples, table, some, hand).score
    for _ in range(4):
        some = gauss_newton(samples, table, some, hand)
    assert rotation_angle(some.rotation[0], turn) < 0.1 and (some.shift[0] - by).norm() < 0.05
    assert some.score > first


def test_look_up_is_hermitian_and_its_gradient_is_the_slope(rng):
    data = density(phantom(32, PIXEL, seed=3), 32, PIXEL).data
    table = look_up_table(data, 10)
    k = torch.rand(50, 3, generator=rng, dtype=torch.float64) * 6
    plus, minus = look_up(table, k), look_up(table, -k)
    assert torch.allclose(plus[:, 0], minus[:, 0].conj(), atol=1e-6 * float(plus[:, 0].abs().max()))
    assert torch.allclose(plus[:, 1:], -minus[:, 1:].conj(), atol=1e-6 * float(plus.abs().max()))
    step = 0.5  # the distance of the table's own samples: differences of the trilinear values are its slope
    grid = (2 * k).floor() / 2 + 0.25
    for axis in range(3):
        along = torch.zeros(3, dtype=torch.float64)
        along[axis] = step
        slope = (look_up(table, grid + along) - look_up(table, grid - along))[:, 0] / (2 * step)
        assert float((slope - look_up(table, grid)[:, 1 + axis]).norm() / slope.norm()) < 0.2


def test_whitened_shells_have_unit_power(rng):
    from frazil.maths.filters import power_spectrum

    power = power_spectrum(whiten(torch.randn(32, 32, 32, generator=rng) + 5))
    assert power[0] < 1e-6 and bool((power[1:16] / power[8] - 1).abs().max() < 0.5)
