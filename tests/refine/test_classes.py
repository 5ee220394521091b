"""K maps without half sets: signal power, SSNR, resolution, and models of some of their classes."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.fourier import padded_ft
from frazil.maths.gridding import sinc2
from frazil.refine.classes import (
    class_shells,
    classes_of,
    copied,
    data_vs_prior,
    first_data_vs_prior,
    reconstruct_classes,
    reference_power,
    spread,
)
from frazil.refine.model import Model, Statistics
from frazil.refine.windows import Engine

BOX, PAD = 16, 2.0
ENGINE = Engine(diameter=60, dtype=torch.float64)


def model(k: int, rng: torch.Generator) -> Model:
    """A model whose classes are all different."""
    n = BOX // 2 + 1
    pdf = torch.rand(k, generator=rng, dtype=torch.float64)
    pdf = pdf / pdf.sum()
    each = torch.rand(4, k, n, generator=rng, dtype=torch.float64)
    return Model(
        maps=torch.randn(k, BOX, BOX, BOX, generator=rng), pixel_size=4.0, sigma2=(torch.ones(n, dtype=torch.float64),),
        scales=torch.ones(2), norm_average=1.0, sigma_offset=5.0, pdf_class=pdf, pdf_direction=pdf[:, None].expand(k, 12) / 12,
        tau2=each[0], data_vs_prior=each[1], fsc=torch.zeros(n), sigma2_map=each[2], coverage=each[3],
    )  # fmt: skip


def test_power_of_a_gaussian_blob_is_that_of_its_transform():
    """exp(−r²/2s²) has the transform (2π)^1.5 s³ exp(−2π²s²k²/N²)/N² in the map's normalisation; τ² is half its square."""
    s = 1.7
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    r2 = line[:, None, None] ** 2 + line[None, :, None] ** 2 + line**2
    blob = torch.exp(-r2 / (2 * s**2))
    found = reference_power(padded_ft(blob, PAD, BOX // 2)[None], BOX, PAD)[0]
    axis = torch.arange(-BOX, BOX + 1, dtype=torch.float64) / PAD
    k2 = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[BOX:] ** 2).flatten()
    amplitude = (2 * math.pi) ** 1.5 * s**3 / BOX**2 * torch.exp(-2 * math.pi**2 * s**2 * k2 / BOX**2)
    shell = (k2.sqrt() + 0.5).long()
    wanted = 0.5 * torch.bincount(shell, amplitude**2) / torch.bincount(shell)
    assert torch.allclose(found[:7], wanted[:7], rtol=1e-3)  # to the tails that the box cuts off


def test_power_stops_at_the_window():
    rng = torch.Generator().manual_seed(3)
    maps = torch.randn(2, BOX, BOX, BOX, generator=rng, dtype=torch.float64)
    found = reference_power(torch.stack([padded_ft(x, PAD, 4) for x in maps]), BOX, PAD)
    assert found.shape == (2, BOX // 2 + 1)
    assert (found[:, :5] > 0).all() and (found[:, 5:] == 0).all()


def test_data_against_prior_is_linear_in_weight_and_prior():
    """Weight w everywhere and T·τ²: κ·τ²·w, κ = P³."""
    m = 17
    weight = torch.full((2 * m + 1, 2 * m + 1, m + 1), 3.0, dtype=torch.float64)
    tau2 = torch.linspace(1, 2, BOX // 2 + 1, dtype=torch.float64)
    assert torch.allclose(data_vs_prior(weight, tau2, PAD), 8 * 3.0 * tau2)


def test_first_data_against_prior():
    tau2, sigma2 = torch.tensor([[4.0, 4.0, 9.0]], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert first_data_vs_prior(tau2, sigma2, torch.tensor([100.0])).tolist() == [[0.0, 100 * 4 / (2 * 2), 100 * 9 / (2 * 2 * 2)]]


def test_resolution_is_the_shell_before_the_first_below_one():
    ssnr = torch.full((4, 12), 2.0)
    ssnr[0, 9] = 0.5
    ssnr[0, 11] = 5.0  # a later rise does not count: there is no second half to confirm it
    ssnr[1, 3] = 0.9  # never below shell 5
    ssnr[3] = 0
    assert class_shells(ssnr).tolist() == [8, 5, 11, 5]


def test_some_classes_and_back(rng):
    whole = model(4, rng)
    live = torch.tensor([0, 3])
    some = classes_of(whole, live)
    assert float(some.pdf_class.sum()) == pytest.approx(1) and float(some.pdf_direction.sum()) == pytest.approx(1)
    assert float(some.pdf_class[1] / some.pdf_class[0]) == pytest.approx(float(whole.pdf_class[3] / whole.pdf_class[0]))
    back = spread(some, live, 4)
    assert torch.equal(back.maps[live], whole.maps[live]) and torch.equal(back.tau2[live], whole.tau2[live])
    for k in (1, 2):
        assert back.maps[k].abs().max() == 0 and back.pdf_class[k] == 0 and back.pdf_direction[k].sum() == 0
    assert classes_of(whole, torch.arange(4)) is whole and spread(whole, torch.arange(4), 4) is whole


def test_copies_share_the_prior(rng):
    one = copied(classes_of(model(3, rng), torch.tensor([1])), 5)
    assert one.classes == 5 and all(torch.equal(one.maps[0], other) for other in one.maps)
    assert one.pdf_class.tolist() == pytest.approx([0.2] * 5) and float(one.pdf_direction.sum()) == pytest.approx(1)


def test_reconstruction_returns_the_map_and_zeros_for_a_class_without_particles(rng):
    """Sums that are the padded transform of a map with even, large weight give that map back; the second class has no weight."""
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    r2 = (line[:, None, None] - 1) ** 2 + line[None, :, None] ** 2 + (line + 2) ** 2
    truth = torch.exp(-r2 / 8)
    ft = padded_ft(truth * sinc2(BOX, PAD, dtype=torch.float64), PAD, BOX // 2)
    weight = torch.full(ft.shape, 1e6, dtype=torch.float64)
    data = torch.stack([ft * weight, torch.zeros_like(ft)])
    # The Hermitian plane x = 0 is summed with its mates: sums that are Hermitian already count twice, as do their weights.
    sums = Statistics(
        data, torch.stack([weight, torch.zeros_like(weight)]), (), torch.zeros(0), torch.zeros(2, 1), 0.0, torch.zeros(2, 2),
        torch.zeros(1), torch.zeros(1), 0.0, 0.0, 0.0, 1,
    )  # fmt: skip
    tau2 = torch.ones(2, BOX // 2 + 1, dtype=torch.float64)
    made = reconstruct_classes(sums, tau2, "C1", BOX, ENGINE, "cpu")
    inside = r2 < 9
    assert (made.maps[0][inside] - truth[inside]).abs().max() < 1e-3
    assert made.maps[1].abs().max() == 0 and made.data_vs_prior[1].abs().max() == 0
    assert made.coverage[0][:6].min() == 1 and made.coverage[1].max() == 0
    assert made.sigma2_map[0][2] == pytest.approx(1 / (8 * 1e6), rel=0.2)  # the plane x = 0 has twice the weight


def test_maps_filtered_alike_do_not_depend_on_the_number_of_particles():
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    r2 = line[:, None, None] ** 2 + line[None, :, None] ** 2 + line**2
    ft = padded_ft(torch.exp(-r2 / 0.6) * sinc2(BOX, PAD, dtype=torch.float64), PAD, BOX // 2)
    many, few, tau2 = 3.0, 1.0, 0.25 / PAD**3  # κ τ² W of the order of 1: filtering shows

    def made(alike: bool, numbers: list[float]) -> torch.Tensor:
        weight = torch.stack([torch.full(ft.shape, n, dtype=torch.float64) for n in numbers])
        k = len(numbers)
        sums = Statistics(
            ft * weight, weight, (), torch.zeros(0), torch.zeros(k, 1), 0.0, torch.zeros(k, 2), torch.zeros(1), torch.zeros(1), 0.0, 0.0,
            0.0, 1,
        )  # fmt: skip
        spectrum = torch.full((k, BOX // 2 + 1), tau2, dtype=torch.float64)
        return reconstruct_classes(sums, spectrum, "C1", BOX, ENGINE, "cpu", alike=alike).maps

    own, same = made(False, [many, few]), made(True, [many, few])
    assert float(own[1].abs().max()) < 0.9 * float(own[0].abs().max())
    torch.testing.assert_close(same[0], same[1], rtol=1e-9, atol=1e-9 * float(same.abs().max()))
    typical = (many**2 + few**2) / (many + few)  # the weight in the class of the mean particle
    torch.testing.assert_close(same[0], made(False, [typical])[0], rtol=1e-6, atol=1e-6 * float(same.abs().max()))
    assert made(True, [many, 0.0])[1].abs().max() == 0
