"""Post-processing against maps whose spectra are known (spec/processing 7.3, checks a to f)."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from frazil.maths.filters import apply_spectrum, apply_to_ft, power_spectrum
from frazil.maths.fsc import corrected_fsc, fsc
from frazil.maths.masks import radii, soft_sphere
from frazil.steps.postprocess import (
    Postprocessed,
    PostprocessParams,
    about_curve,
    compare_halves,
    fsc_weight,
    particle_fsc,
    postprocess,
)

BOX, PIXEL = 64, 1.0


def noise(rng: torch.Generator, box: int = BOX) -> Tensor:
    """White noise of variance 1."""
    return torch.randn(box, box, box, generator=rng)


def params(**values) -> PostprocessParams:
    """Parameters, defaults but for those given."""
    return PostprocessParams.model_validate(values)


def decaying(rng: torch.Generator, b_factor: float) -> Tensor:
    """White noise with amplitudes exp(B k²/4), so that its Guinier plot has slope B/4."""
    return apply_to_ft(noise(rng), lambda r: torch.exp(b_factor / 4 * (r / (BOX * PIXEL)).square()))


@pytest.fixture
def done(rng: torch.Generator) -> Postprocessed:
    """Halves of a signal that ends at about 4 Å, in a sphere."""
    sphere = soft_sphere(BOX, 16, 8)
    signal = apply_to_ft(noise(rng), lambda r: 20 * torch.exp(-r / 4)) * sphere
    halves = [signal + noise(rng) for _ in range(2)]
    return postprocess(*halves, soft_sphere(BOX, 20, 10), PIXEL, params())


def test_fsc_of_known_signal_to_noise(rng: torch.Generator) -> None:
    expected = 1 / (1 + 1 / (30 * torch.exp(-torch.arange(BOX // 2 + 1, dtype=torch.float64) / 6)))
    curves = []
    for _ in range(40):
        signal = apply_to_ft(noise(rng), lambda r: (30 * torch.exp(-r / 6)).sqrt())
        curves.append(fsc(signal + noise(rng), signal + noise(rng), relion=True))
    # The standard error of the mean is (1 − FSC²)/sqrt(40 · 2π r²): 0.004 where the curve is steepest.
    assert (torch.stack(curves).mean(0) - expected)[3:].abs().max() < 0.01


def test_small_boxes_get_the_mean_of_several_random_curves(rng: torch.Generator) -> None:
    """By the seed the curve scatters less than half as much as that of a single set (a quarter of it is expected of 16)."""
    halves, tight = [noise(rng) for _ in range(2)], (radii(BOX, 3) < 14).float()
    once = [corrected_fsc(*halves, tight, seed, randomise_from=3, relion=True).randomised for seed in range(4)]
    ours = [compare_halves(*halves, tight, PIXEL, params(randomise_from=BOX / 3), seed).randomised for seed in range(4)]
    assert torch.stack(ours)[:, 5:].std(0).mean() < 0.5 * torch.stack(once)[:, 5:].std(0).mean()


@pytest.mark.parametrize("b_factor", [-120.0, -40.0])
def test_b_factor_is_found_and_taken_off(rng: torch.Generator, b_factor: float) -> None:
    signal = decaying(rng, b_factor)
    halves = [signal + 1e-4 * noise(rng) for _ in range(2)]
    found = postprocess(*halves, torch.ones_like(signal), PIXEL, params())
    assert found.b_factor == pytest.approx(b_factor, rel=0.05) and found.guinier.correlation > 0.97
    flat = power_spectrum(found.data)[5:28].sqrt()
    assert float(flat.std() / flat.mean()) < 0.06  # sharpened to white
    given = postprocess(*halves, torch.ones_like(signal), PIXEL, params(b_factor=-30.0))
    assert given.b_factor == -30.0


def test_mtf_is_divided_out(rng: torch.Generator) -> None:
    table = np.stack([np.linspace(0, 1, 101), np.linspace(1, 0.2, 101) ** 2], 1)
    plain, detector = noise(rng), 0.8 * PIXEL
    def mtf(r: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(r.numpy() / (BOX * PIXEL) * detector, table[:, 0], table[:, 1]))

    blurred = apply_to_ft(plain, mtf)
    kept = params(b_factor=0.0, fsc_weighting=False)
    found = postprocess(blurred, blurred + 1e-5 * noise(rng), None, PIXEL, kept, (table, detector))
    ratio = (power_spectrum(found.data) / power_spectrum(plain)).sqrt()[1:29]
    assert (ratio - 1).abs().max() < 0.02
    gained = (found.guinier.mtf_corrected - found.guinier.original)[30].item()
    assert gained == pytest.approx(-np.log(float(mtf(torch.tensor([30.0])))), abs=0.01)


def test_weights_are_those_of_rosenthal_and_henderson() -> None:
    curve = torch.tensor([1.0, 0.5, 0.143, 0.1, 5e-5, 0.9], dtype=torch.float64)
    assert fsc_weight(curve).tolist() == pytest.approx([1, 0.8165, 0.5002, 0.4264, 0, 0], abs=1e-4)


def test_particle_share() -> None:
    curve = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert particle_fsc(curve, 1.0).tolist() == [1, 0.5, 0] and particle_fsc(curve, 4.0).tolist() == pytest.approx([1, 0.8, 0])


def test_the_map_is_weighted_and_ends_where_the_curve_does(done: Postprocessed) -> None:
    assert 3.0 < done.resolution < 6.0 and done.resolution_half > done.resolution
    dead = (done.used < 1e-4).nonzero()
    assert len(dead) and power_spectrum(done.data)[int(dead[0]) + 1 :].max() < 1e-9 * power_spectrum(done.data).max()
    assert done.curves.masked[8:12].mean() > done.curves.unmasked[8:12].mean()
    assert done.fraction == pytest.approx(0.476 / float((soft_sphere(BOX, 20, 10) > 0.5).double().mean()))
    assert not [line for line in done.warnings if "tight" in line or "independent" in line]


def noise_halves(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise that is joined up to shell 4, and a tight mask full of holes."""
    g = torch.Generator().manual_seed(seed)
    joined = apply_to_ft(noise(g), lambda r: 25.0 * ((r <= 4) & (r > 0)).double())
    rough = apply_to_ft(noise(g), lambda r: (r < 14).double())
    return joined + noise(g), joined + noise(g), ((rough > 0) & (radii(BOX, 3) < 16)).float()


def test_noise_in_a_tight_mask_is_corrected_to_nothing() -> None:
    found = [postprocess(*noise_halves(seed), PIXEL, params(force_mask=True)) for seed in range(4)]
    start = (found[0].curves.randomise_from or 0) + 2
    masked, corrected = (torch.stack([getattr(f.curves, name) for f in found])[:, start:] for name in ("masked", "corrected"))
    assert masked[:, :12].mean() > 0.3 and masked.mean() > 0.1
    assert abs(float(corrected.mean())) < 0.05
    assert abs(float(corrected[:, 12:].mean())) < 0.03
    assert all(any("too tight" in line for line in f.warnings) for f in found)


def test_halves_that_are_not_independent_are_told(rng: torch.Generator) -> None:
    mask = soft_sphere(BOX, 18, 8)
    signal = apply_to_ft(noise(rng), lambda r: 20 * torch.exp(-r / 4)) * mask
    a, b = (signal + noise(rng) for _ in range(2))

    def told(first: Tensor, second: Tensor) -> str:
        return " ".join(postprocess(first, second, mask, PIXEL, params(b_factor=0.0)).warnings)

    assert "identical" in told(a, a.clone())
    assert "solvent" in told(a, 0.7 * a + 0.7 * b)
    low = torch.zeros(BOX // 2 + 1, dtype=torch.float64)
    low[:7] = 1
    mean = apply_spectrum((a + b) / 2, low)
    assert "joined at low resolution" in told(*(x - apply_spectrum(x, low) + mean for x in (a, b)))
    assert "independent" not in told(a, b)


def test_what_is_said_of_curves() -> None:
    r = torch.arange(33, dtype=torch.float64)
    falling = 1 / (1 + torch.exp(r - 16))
    assert about_curve(falling, 64, 1.0) == []
    assert "limit of the pixels" in about_curve(torch.ones(33, dtype=torch.float64), 64, 1.0)[0]
    again = falling.clone()
    again[22:26] = 0.4
    assert "rises again" in about_curve(again, 64, 1.0)[0]
    dip = falling.clone()
    dip[6:8] = 0.5
    assert "dips to 0.50" in about_curve(dip, 64, 1.0)[0]


def test_without_fall_nothing_is_corrected_and_without_shells_nothing_sharpened(rng: torch.Generator) -> None:
    data = noise(rng)
    found = postprocess(data, data + 0.1 * noise(rng), soft_sphere(BOX, 20, 8), PIXEL, params(fit_from=2.05))
    words = " ".join(found.warnings)
    assert found.curves.randomise_from is None and "never falls below" in words and "not sharpened" in words and found.b_factor == 0


def test_arguments_stay_as_they_are(done: Postprocessed, rng: torch.Generator) -> None:
    a, b, mask = noise(rng), noise(rng), soft_sphere(BOX, 20, 8)
    copies = [x.clone() for x in (a, b, mask)]
    postprocess(a, b, mask, PIXEL, params())
    assert all(torch.equal(x, y) for x, y in zip((a, b, mask), copies, strict=True))
