"""Critical exposures and dose weights against the published numbers."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.dose import critical_exposure, damage, dose_weights, frame_exposures, voltage_factor


def test_critical_exposures_are_those_of_the_paper() -> None:
    d = torch.tensor([20.0, 10, 7, 5, 3, 2], dtype=torch.float64)
    assert torch.allclose(critical_exposure(1 / d), torch.tensor([38.73, 14.14, 9.07, 6.39, 4.34, 3.59], dtype=torch.float64), atol=6e-3)
    left = damage(1 / d, torch.tensor([40.0]))[0]
    assert torch.allclose(left, torch.tensor([0.597, 0.243, 0.110, 0.0436, 0.00997, 0.0038], dtype=torch.float64), atol=6e-4)


@pytest.mark.parametrize("voltage, factor", [(300, 1.0), (200, 0.8), (100, 0.64), (250, 0.9), (60, 0.64)])
def test_voltage(voltage: float, factor: float) -> None:
    assert voltage_factor(voltage) == pytest.approx(factor)


def test_weights_keep_the_noise_and_are_equal_at_dc() -> None:
    k = torch.linspace(0, 0.7, 30, dtype=torch.float64)
    weights = dose_weights(k, frame_exposures(40, 1.3, 5.0))
    assert torch.allclose(weights.square().sum(0), torch.ones(30, dtype=torch.float64))
    assert torch.allclose(weights[:, 0], torch.full((40,), 40**-0.5, dtype=torch.float64))
    assert bool((weights[1:] <= weights[:-1]).all())
    assert frame_exposures(3, 2.0, 1.0).tolist() == [3.0, 5.0, 7.0]  # at the end of each frame
