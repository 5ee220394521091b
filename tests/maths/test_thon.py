"""maths/thon.py: bins, splines, phase, search and fit on spectra that are exactly what the model says, and on noise."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.data import Optics
from frazil.maths import thon
from frazil.maths.ctf import ctf, phase_argument
from frazil.maths.thon import (
    PolarBins,
    Rings,
    SearchRange,
    defocus_of,
    fit,
    half_phase,
    make_rings,
    nonnegative,
    orthonormal,
    polar_bins,
    polar_mean,
    search,
    splines,
    theta_of,
)

OPTICS = Optics(1.4, cs=2.7)
N = 384


def grid(n: int = N, pixel: float = 1.4) -> tuple[Tensor, Tensor]:
    return torch.fft.fftfreq(n, pixel, dtype=torch.float64), torch.arange(n // 2 + 1, dtype=torch.float64) / (n * pixel)


def bins_of(n: int = N, pixel: float = 1.4, finest: float = 4.0) -> PolarBins:
    ky, kx = grid(n, pixel)
    return polar_bins(ky, kx, (1 / 30, 1 / finest), 1 / (n * pixel), (2 / (n * pixel), 2 / (n * pixel)))


def spectrum(defocus: tuple[float, float, float], phase: float = 0.0, noise: float = 0.0, rng: torch.Generator | None = None) -> Tensor:
    """(N, N/2+1) power with a steep background, drift in one direction, and rings of |CTF|²."""
    ky, kx = grid()
    k = torch.stack(torch.broadcast_tensors(kx[None, :], ky[:, None]), -1)
    one = torch.ones(1, dtype=torch.float64)
    c = ctf(k.reshape(-1, 2), torch.tensor([defocus], dtype=torch.float64), phase * one, 0 * one, one, OPTICS).reshape(k.shape[:2])
    k2 = k.square().sum(-1)
    drift = torch.exp(-3 * k[..., 0].square())
    power = (1 + 30 * torch.exp(-40 * k2.sqrt())) * drift * (1 + 0.3 * torch.exp(-20 * k2) * c.square())
    if noise:
        power = power * torch.exp(noise * torch.randn(power.shape, generator=rng, dtype=torch.float64))
    return power


def rings_of(power: Tensor, bins: PolarBins) -> Rings:
    return make_rings(polar_mean(power, bins), bins.count, bins, OPTICS, torch.ones(N, dtype=torch.float64), 1.4)


def test_polar_means_are_means_and_leave_the_cross_out(rng: torch.Generator) -> None:
    bins = bins_of(64)
    ky, kx = grid(64)
    values = torch.rand(3, 64, 33, generator=rng, dtype=torch.float64)
    means = polar_mean(values, bins)
    y, x = torch.broadcast_tensors(ky[:, None], kx[None])
    k = torch.hypot(y, x)
    s, r = 7, 9  # any bin: 35° to 40°, found again by its definition
    first = math.floor(1 / 30 / bins.width)
    angle = torch.rad2deg(torch.atan2(y, x)) % 180
    inside = (angle >= 5 * s) & (angle < 5 * s + 5) & ((k / bins.width).long() == first + r) & (y.abs() > 2 / 89.6) & (x > 2 / 89.6)
    assert int(inside.sum()) == int(bins.count[s, r]) > 0
    torch.testing.assert_close(means[:, s, r], values[:, inside].mean(-1))
    torch.testing.assert_close(bins.terms[0, s, r], k[inside].square().mean())
    assert float(polar_mean((x <= 2 / 89.6).double(), bins).max()) == 0


def test_splines_add_up_to_one_and_hold_cubics() -> None:
    x = torch.linspace(-1.3, 2.1, 400, dtype=torch.float64)
    basis = splines(x, -1.3, 2.1, 7)
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(x))
    cubic = 1 - x + 0.5 * x**2 - 2 * x**3
    solution = torch.linalg.lstsq(basis, cubic[:, None]).solution
    torch.testing.assert_close(basis @ solution, cubic[:, None], atol=1e-9, rtol=0)


def test_the_phase_is_that_of_the_ctf(rng: torch.Generator) -> None:
    k = 0.3 * torch.randn(50, 2, generator=rng, dtype=torch.float64)
    k2 = k.square().sum(-1)
    terms = torch.stack([k2, k[:, 0] ** 2 - k[:, 1] ** 2, 2 * k[:, 0] * k[:, 1], k2.square()])
    defocus, phase = torch.tensor([[21000.0, 19500.0, 37.0]], dtype=torch.float64), torch.tensor([75.0], dtype=torch.float64)
    theta = theta_of(defocus, phase)
    torch.testing.assert_close(half_phase(terms, theta, OPTICS), phase_argument(k, defocus, phase, OPTICS))
    back, shift = defocus_of(theta)
    torch.testing.assert_close(back, defocus)
    torch.testing.assert_close(shift, phase)


@pytest.mark.parametrize("u, v, angle", [(12000.0, 11000.0, 90.0), (11000.0, 12000.0, 20.0), (12000.0, 11000.0, 200.0)])
def test_defocus_is_written_one_way(u: float, v: float, angle: float) -> None:
    found, _ = defocus_of(theta_of(torch.tensor([u, v, angle], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)))
    assert found[0] >= found[1] and -90 < found[2] <= 90
    wanted = angle if u > v else angle + 90
    assert (float(found[2]) - wanted) % 180 == pytest.approx(0, abs=1e-9) or (float(found[2]) - wanted) % 180 == pytest.approx(180)


@pytest.mark.parametrize("mean, astigmatism, angle", [
    (3000, 0, 0), (4500, 1500, -62), (9000, 250, 85), (18000, 2000, 30), (40000, 900, -15), (57000, 300, 5),
])  # fmt: skip
def test_exact_spectra_give_their_defocus(mean: float, astigmatism: float, angle: float) -> None:
    """The whole search range, no start given. What is left: |CTF|² in the logarithm is no pure cosine, bins are not points."""
    truth = torch.tensor([mean + astigmatism / 2, mean - astigmatism / 2, angle], dtype=torch.float64)
    rings = rings_of(spectrum((float(truth[0]), float(truth[1]), angle)), bins_of())
    where = SearchRange()
    found, phase = defocus_of(fit(rings, search(rings, where), where).theta)
    assert float(found[:2].mean() - mean) == pytest.approx(0, abs=8)
    assert float(found[0] - found[1]) - astigmatism == pytest.approx(0, abs=12)
    if astigmatism:
        assert (float(found[2]) - angle + 90) % 180 - 90 == pytest.approx(0, abs=1)
    assert float(phase) == 0


def test_phase_shifts_are_found_with_the_defocus() -> None:
    where = SearchRange(phases=tuple(float(p) for p in range(0, 180, 20)))
    for shift in (92.0, 171.0):
        rings = rings_of(spectrum((15300, 14700, 20), shift), bins_of())
        found, phase = defocus_of(fit(rings, search(rings, where), where).theta)
        assert float(found[:2].mean()) == pytest.approx(15000, abs=25)
        assert (float(phase) - shift + 90) % 180 - 90 == pytest.approx(0, abs=2)


def test_errors_are_as_large_as_promised_and_noise_gains_little(rng: torch.Generator) -> None:
    bins, where, offs = bins_of(), SearchRange(), []
    start = theta_of(torch.tensor([[12100.0, 11900.0, 10.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for _ in range(12):
        found = fit(rings_of(spectrum((12400, 11800, 25), 0.0, 1.0, rng), bins), start, where)
        offs.append((found.theta[:3] - theta_of(torch.tensor([12400.0, 11800, 25]).double(), torch.tensor(0.0).double())[:3])
                    / found.covariance.diagonal()[:3].sqrt())  # fmt: skip
    z = torch.stack(offs)
    assert 0.6 < float(z.square().mean().sqrt()) < 1.5
    ky, kx = grid()
    flat = torch.exp(torch.randn(len(ky), len(kx), generator=rng, dtype=torch.float64))
    rings = rings_of(flat, bins)
    assert fit(rings, search(rings, where), where).gain < 45


def test_orthonormal_columns_span_the_same_also_where_some_depend_on_others(rng: torch.Generator) -> None:
    free = torch.randn(300, 7, generator=rng, dtype=torch.float64)
    free[:, 6] = free[:, 0] + 1e-5 * free[:, 6]  # nearly dependent, but not quite
    exact = torch.linalg.qr(free)[0]
    dependent = torch.cat([free, free[:, :2].sum(-1, keepdim=True)], -1)  # adds nothing
    assert float((orthonormal(free).T @ orthonormal(free) - torch.eye(7)).abs().max()) < 1e-6
    for made in (orthonormal(free), orthonormal(dependent)):
        assert float((made @ made.T - exact @ exact.T).abs().max()) < 1e-4


def test_the_slope_of_the_fit_is_that_of_its_cost(rng: torch.Generator) -> None:
    """−½ of it, by finite differences, background and envelope fitted anew; rings strong enough that the envelope stays off its bound."""
    rings = rings_of(spectrum((9000.0, 8600.0, 25.0), noise=0.05, rng=rng), bins_of())
    truth = theta_of(torch.tensor([9000.0, 8600.0, 25.0], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    prior = torch.tensor([0.0, 1e-6, 1e-6, 0.0], dtype=torch.float64)
    fixed = thon._fixed(rings, 4)
    at = (truth + torch.tensor([8.0, -6.0, 5.0, 0.01], dtype=torch.float64))[None]
    here = thon._evaluate(fixed, at, prior)
    for i, small in enumerate((0.05, 0.05, 0.05, 1e-4)):
        step = torch.zeros(1, 4, dtype=torch.float64)
        step[0, i] = small
        change = (thon._evaluate(fixed, at + step, prior).cost - thon._evaluate(fixed, at - step, prior).cost) / (2 * small)
        assert float(here.slope[0, i]) == pytest.approx(-0.5 * float(change), rel=0.1, abs=0.1 * float(here.slope[0, 0].abs())), i


def test_nonnegative_least_squares_against_scipy(np_rng) -> None:
    from scipy.optimize import nnls

    for _ in range(20):
        a, b = np_rng.standard_normal((9, 4)), np_rng.standard_normal(9)
        exact = nnls(a, b)[0]
        found = nonnegative(torch.from_numpy(a.T @ a)[None], torch.from_numpy(a.T @ b)[None])[0]
        torch.testing.assert_close(found, torch.from_numpy(exact), atol=1e-10, rtol=0)


def test_arguments_stay_as_they_are() -> None:
    power, bins = spectrum((12400, 11800, 25)), bins_of()
    polar = polar_mean(power, bins)
    kept = polar.clone(), bins.count.clone(), bins.terms.clone()
    rings = make_rings(polar, bins.count, bins, OPTICS, torch.ones(N, dtype=torch.float64), 1.4)
    starts = search(rings, SearchRange())
    before = starts.clone()
    fit(rings, starts, SearchRange())
    assert torch.equal(starts, before) and torch.equal(polar, kept[0])
    assert torch.equal(bins.count, kept[1]) and torch.equal(bins.terms, kept[2])
