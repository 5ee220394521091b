"""What tells that two maps are not the independent halves of one data set."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.filters import apply_spectrum, apply_to_ft, lowpass_map
from frazil.maths.fsc import fsc
from frazil.maths.independence import compare_shells, identical, not_two_halves, shared_shells, solvent_correlation
from frazil.maths.masks import soft_sphere

BOX = 48


@pytest.fixture
def halves(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal to about shell 12, white noise."""
    signal = apply_to_ft(torch.randn(BOX, BOX, BOX, generator=rng), lambda r: 30 * torch.exp(-r / 3)) * soft_sphere(BOX, 14, 4)
    a, b = (signal + torch.randn(BOX, BOX, BOX, generator=rng) for _ in range(2))
    return a, b


def test_true_halves_pass(halves) -> None:
    a, b = halves
    assert not_two_halves(compare_shells(a, b)) is None and not identical(a, b)
    assert not_two_halves(compare_shells(a, 3 * b)) is None  # another scale is no fault
    value, error = solvent_correlation(a, b, soft_sphere(BOX, 16, 4))
    assert abs(value) < 4 * error < 0.1
    assert shared_shells(fsc(a, b)) == 0


def test_shells_are_those_of_the_fsc(halves) -> None:
    torch.testing.assert_close(compare_shells(*halves).fsc, fsc(*halves), atol=1e-5, rtol=0)


def test_a_half_beside_the_mean_or_a_filtered_map_is_found(halves) -> None:
    a, b = halves
    for pair in ((a, (a + b) / 2), ((a + b) / 2, b)):
        assert "mean of both" in (not_two_halves(compare_shells(*pair)) or "")
    assert "second is filtered" in (not_two_halves(compare_shells(a, lowpass_map((a + b) / 2, 1.0, 6.0))) or "")
    assert "first is filtered" in (not_two_halves(compare_shells(lowpass_map(a, 1.0, 6.0), b)) or "")


def test_noise_in_common_is_seen_in_the_solvent_only_where_it_is(halves, rng) -> None:
    a, b = halves
    common = torch.randn(BOX, BOX, BOX, generator=rng)
    value, error = solvent_correlation(a + common, b + common, soft_sphere(BOX, 16, 4))
    assert value == pytest.approx(0.5, abs=0.05) and value > 5 * error
    # A strong blob in common that a hard mask cuts is no noise: nothing of it may leak into the answer.
    blob = 200 * soft_sphere(BOX, 6, 14)
    value, error = solvent_correlation(a + blob, b + blob, soft_sphere(BOX, 9, 0))
    assert abs(value) < 0.05


def test_shells_joined_at_low_resolution_are_found(halves) -> None:
    a, b = halves
    low = torch.zeros(BOX // 2 + 1, dtype=torch.float64)
    low[:6] = 1
    mean = apply_spectrum((a + b) / 2, low)
    joined = [x - apply_spectrum(x, low) + mean for x in (a, b)]
    assert shared_shells(fsc(*joined)) == 5
    assert shared_shells(torch.ones(10)) == 9


def test_identical_but_for_rounding(halves) -> None:
    a, _ = halves
    assert identical(a, a + 1e-7 * a.abs().max()) and not identical(a, a * 1.01)
