"""Map against model: crossing of a curve, relative B-factor, the mask, on maps with known answers."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.simulate.phantom import density, phantom
from frazil.steps.map_filter import b_factor_map
from frazil.steps.model_fsc import crossing, fit_to_model, model_mask, relative_b_factor

BOX, PIXEL = 48, 1.5


def test_crossing_is_linear_between_shells_and_passes_over_the_solvent():
    curve = torch.ones(BOX // 2 + 1, dtype=torch.float64)
    curve[1:3] = 0.2  # solvent
    curve[15] = 0.6
    curve[16:] = 0.1
    between, last = crossing(curve, 0.5, BOX, PIXEL)
    assert last == BOX * PIXEL / 15 and between == pytest.approx(BOX * PIXEL / 15.2)
    assert crossing(torch.zeros(25, dtype=torch.float64), 0.5, BOX, PIXEL) == (999.0, 999.0)
    assert crossing(torch.ones(25, dtype=torch.float64), 0.5, BOX, PIXEL)[0] == 2 * PIXEL


def test_the_relative_b_factor_is_recovered():
    model = density(phantom(BOX, PIXEL, seed=3), BOX, PIXEL).data.double()
    curve = torch.ones(BOX // 2 + 1, dtype=torch.float64)
    assert relative_b_factor(3 * b_factor_map(model, PIXEL, 60.0), model, curve, PIXEL) == pytest.approx(60, abs=0.5)
    assert math.isnan(relative_b_factor(model, model, 0 * curve, PIXEL))


def test_noise_of_known_ssnr_gives_the_expected_curve(rng):
    """Model S, map S + noise: FSC = sqrt(SSNR/(1 + SSNR)) a shell, within its scatter."""
    from frazil.maths.filters import power_spectrum

    model = torch.randn(BOX, BOX, BOX, generator=rng)
    model = b_factor_map(model, PIXEL, 40.0)
    noise = 0.3 * torch.randn(BOX, BOX, BOX, generator=rng)
    ssnr = power_spectrum(model) / power_spectrum(noise)
    found = fit_to_model(model + noise, model, torch.ones(BOX, BOX, BOX), PIXEL)
    expected = (ssnr / (1 + ssnr)).sqrt()
    assert (found.unmasked - expected)[4:].abs().max() < 0.08 and (found.unmasked - expected)[4:].abs().mean() < 0.02
    assert torch.allclose(found.masked, found.unmasked)


def test_a_mask_around_atoms():
    atoms = torch.tensor([[30.0, 30.0, 30.0], [36.0, 30.0, 30.0]], dtype=torch.float64)
    mask = model_mask(atoms, BOX, PIXEL, 4.5, 6.0)
    assert mask[20, 20, 20] == 1 and mask[20, 20, 24] == 1 and mask[20, 20, 23] == 1  # z y x = 30 Å / 1.5
    assert mask[20, 20, 20 + 4 + 3 + 4] == 0 and 0 < mask[20, 20, 24 + 5] < 1
    volume = float(model_mask(atoms[:1], BOX, PIXEL, 12.0, 0.0).sum()) * PIXEL**3
    assert volume == pytest.approx(4 / 3 * math.pi * 12**3, rel=0.06)


def test_a_perfect_map_fits_its_model():
    model = density(phantom(BOX, PIXEL, seed=3), BOX, PIXEL).data
    mask = (model > 0.1 * model.max()).float()
    found = fit_to_model(5 * model, model, mask, PIXEL)
    assert found.crossing == 2 * PIXEL and found.correlation > 0.9999 and abs(found.b_factor) < 1e-3
