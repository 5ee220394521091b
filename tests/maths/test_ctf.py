"""CTF and aberrations against published numbers and RELION 3.1.3 (spec/refinement 1.5, 9.1.13; spec/processing 0.2-0.4, 8.5)."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frazil.data import Optics
from frazil.maths.ctf import ctf, even_index, odd_index, odd_phase, wavelength, zernike

KRIOS = Optics(pixel_size=1.0, box=64, voltage=300.0, cs=2.7, amplitude_contrast=0.1)


def values(k: Tensor, optics: Optics = KRIOS, u: float = 15000, v: float | None = None, angle: float = 0, *, ps: float = 0, b: float = 0,
           scale: float = 1, mode: str = "normal") -> Tensor:  # fmt: skip
    """CTF of one particle at k (p, 2)."""
    one = [torch.tensor([x], dtype=torch.float64) for x in (ps, b, scale)]
    defocus = torch.tensor([[u, u if v is None else v, angle]], dtype=torch.float64)
    return ctf(k, defocus, *one, optics, mode=mode)[0]


def on_x(*k: float) -> Tensor:
    return torch.tensor([[x, 0.0] for x in k], dtype=torch.float64)


@pytest.mark.parametrize(("voltage", "expected"), [(100, 0.0370146), (120, 0.0334923), (200, 0.0250795), (300, 0.0196876)])
def test_wavelengths(voltage: float, expected: float) -> None:
    assert wavelength(voltage) == pytest.approx(expected, abs=6e-8)


def test_known_values_at_15000() -> None:
    found = values(on_x(0.05, 0.1, 0.2, 1 / 3))
    assert found.tolist() == pytest.approx([0.662428, 0.079321, -0.844959, -0.973996], abs=2e-6)
    assert values(on_x(0.0)).item() == pytest.approx(0.1)


@pytest.mark.parametrize(("defocus", "first", "count"), [(15000, [17.455, 12.235, 9.957, 8.606, 7.687], 31), (10000, [14.242], 20)])
def test_zeros(defocus: float, first: list[float], count: int) -> None:
    k = torch.linspace(0, 1 / 3, 400001, dtype=torch.float64)
    found = values(torch.stack([k, torch.zeros_like(k)], -1), u=defocus)
    crossing = (found[1:] * found[:-1] < 0).nonzero()[:, 0]
    assert len(crossing) == count
    between = k[crossing] + (k[1] - k[0]) * found[crossing] / (found[crossing] - found[crossing + 1])
    assert (1 / between[: len(first)]).tolist() == pytest.approx(first, abs=1e-3)


def test_astigmatism_is_u_along_its_angle_and_even() -> None:
    turn = math.radians(33)
    k = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64) * 0.11
    found = values(k, u=16000, v=13000, angle=33)
    assert found[0].item() == pytest.approx(values(on_x(0.11), u=16000).item(), abs=1e-9)
    assert found[1].item() == pytest.approx(values(on_x(0.11), u=13000).item(), abs=1e-9)
    torch.testing.assert_close(values(-k, u=16000, v=13000, angle=33), found)
    torch.testing.assert_close(values(k, u=16000, v=13000, angle=213), found)
    torch.testing.assert_close(values(k, u=13000, v=16000, angle=123), found)


def test_phase_shift_b_factor_and_scale() -> None:
    k = on_x(0.0, 0.1)
    assert values(k, ps=90)[0].item() == pytest.approx(math.cos(math.asin(0.1)))
    torch.testing.assert_close(values(k, b=80, scale=0.5), values(k) * torch.tensor([0.5, 0.5 * math.exp(-0.2)]))


# CTFs that RELION 3.1.3's relion_project put on the transform of a point, 32 px of 2 Å, 300 kV, Cs 2.7, Q0 0.1, defocus 12000, 9000, 33°;
# at these kx, ky (cycles per box).
PIXELS = torch.tensor([[0, 0], [5, 2], [7, -3], [3, 11], [12, -6], [1, 0]], dtype=torch.float64) / 64
EVEN = (0.3, 10.0, -7.0, 5.0, 60.0, -50.0, 40.0, 30.0, -20.0)
MAGNIFICATION = (1.05, 0.04, 0.01, 0.97)
RELION = {
    "plain": [0.1, -0.838169, 0.639643, 0.955499, 0.781537, 0.26472],
    "even": [0.07587, -0.267141, -0.919922, 0.985883, -0.088564, -0.173661],
    "magnified": [0.1, -0.39573, 0.267232, 0.976641, 0.955223, 0.281689],
    "even magnified": [0.07587, -0.885235, -0.526068, 0.96285, -0.996504, -0.198523],
    "b": [0.661187, -0.091761, -0.127824, 0.244778, 0.56402, 0.72577],
    "b magnified": [0.08, -0.281196, 0.171401, 0.490048, 0.38775, 0.224443],
    "intact_first_peak": [1.0, -0.838169, 0.639643, 0.955499, 0.781537, 1.0],
    "phase_flipped": [0.1, 0.838169, 0.639643, 0.955499, 0.781537, 0.26472],
}


@pytest.mark.parametrize("case", RELION)
def test_values_are_those_of_relion(case: str) -> None:
    optics = replace(KRIOS, even_zernike=EVEN) if "even" in case else KRIOS
    optics = replace(optics, magnification=MAGNIFICATION) if "magnified" in case else optics
    more = {"b": {"ps": 50, "b": 30, "scale": 0.8}, "b magnified": {"b": 60, "scale": 0.8}}.get(case, {})
    more |= {"mode": case} if "_" in case else {}
    assert values(PIXELS, optics, 12000, 9000, 33, **more).tolist() == pytest.approx(RELION[case], abs=1.5e-6)


def test_intact_up_to_the_first_maximum_only() -> None:
    found = values(on_x(0.0, 0.02, 0.035, 0.05), mode="intact_first_peak")  # the phase is π/2 at 0.041
    assert found.tolist() == pytest.approx([1, 1, 1, 0.662428], abs=2e-6)
    assert (values(on_x(0.035, 0.05)) < 0.95).all()


def test_sign_only_and_the_floor() -> None:
    k = PIXELS
    assert torch.equal(values(k, mode="only_flip"), values(k).sign())
    assert values(k, scale=0.0).abs().tolist() == [1e-8] * 6
    assert (values(on_x(*[1 / 17.455]), b=1e6).abs() == 1e-8).all()
    with pytest.raises(ValueError, match="normal"):
        values(k, mode="flip")


def test_float32_is_safe_at_a_phase_of_thousands_of_radians() -> None:
    k = on_x(*torch.linspace(0, 0.8, 2001).tolist())  # 1.25 Å: the phase passes 2000 rad
    exact = values(k, u=50000)
    one = [torch.tensor([x], dtype=torch.float64) for x in (0.0, 0.0, 1.0)]
    single = ctf(k, torch.tensor([[50000.0, 50000.0, 0.0]]), *one, KRIOS, dtype=torch.float32)[0]
    assert single.dtype == torch.float32 and (single - exact).abs().max() < 5e-7
    rounded = values(k.float(), u=50000)  # here only the frequencies are rounded
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 2e-3


def test_a_batch_is_its_particles_one_by_one(rng: torch.Generator) -> None:
    k = torch.randn(50, 2, generator=rng, dtype=torch.float64) * 0.1
    defocus = torch.rand(4, 3, generator=rng, dtype=torch.float64) * torch.tensor([20000.0, 20000.0, 180.0])
    ps, b, s = torch.rand(3, 4, generator=rng, dtype=torch.float64) * torch.tensor([[90.0], [50.0], [2.0]])
    optics = replace(KRIOS, even_zernike=EVEN)
    batch = ctf(k, defocus, ps, b, s, optics)
    assert batch.shape == (4, 50)
    alone = [values(k, optics, *defocus[i].tolist(), ps=ps[i].item(), b=b[i].item(), scale=s[i].item()) for i in range(4)]
    torch.testing.assert_close(batch, torch.stack(alone))


def test_zernike_polynomials_are_the_written_ones(rng: torch.Generator) -> None:
    k = torch.randn(9, 2, generator=rng, dtype=torch.float64)
    x, y = k.unbind(-1)
    r2 = x**2 + y**2
    written = {
        (0, 0): torch.ones_like(x), (1, -1): y, (1, 1): x, (2, -2): 2 * x * y, (2, 0): 2 * r2 - 1, (2, 2): x**2 - y**2,
        (3, -3): 3 * x**2 * y - y**3, (3, -1): (3 * r2 - 2) * y, (3, 1): (3 * r2 - 2) * x, (3, 3): x**3 - 3 * x * y**2,
        (4, 0): 6 * r2**2 - 6 * r2 + 1, (4, -2): (4 * r2 - 3) * 2 * x * y, (4, 2): (4 * r2 - 3) * (x**2 - y**2),
        (4, 4): x**4 - 6 * x**2 * y**2 + y**4, (4, -4): 4 * x**3 * y - 4 * x * y**3,
    }  # fmt: skip
    for (n, m), expected in written.items():
        torch.testing.assert_close(zernike(n, m, k), expected)


def test_order_of_the_coefficients() -> None:
    assert [even_index(i) for i in range(9)] == [(0, 0), (2, -2), (2, 0), (2, 2), (4, -4), (4, -2), (4, 0), (4, 2), (4, 4)]
    assert [odd_index(i) for i in range(12)] == [
        (1, -1), (1, 1), (3, -3), (3, -1), (3, 1), (3, 3), (5, -5), (5, -3), (5, -1), (5, 1), (5, 3), (5, 5)
    ]  # fmt: skip


def test_beam_tilt_of_one_milliradian_is_139_degrees_at_3_angstroms() -> None:
    tilted = replace(KRIOS, beam_tilt=(1.0, 0.0))
    phase = torch.rad2deg(odd_phase(on_x(1 / 3, -1 / 3, 1 / 6), tilted))
    assert phase.tolist() == pytest.approx([-139.5, 139.5, -139.5 / 8], abs=0.05)
    along_y = torch.tensor([[1 / 3, 0.0], [0.0, 1 / 3]], dtype=torch.float64)
    assert torch.rad2deg(odd_phase(along_y, replace(KRIOS, beam_tilt=(0.0, 2.0)))).tolist() == pytest.approx([0, -279.0], abs=0.1)


def test_odd_phase_is_odd_adds_up_and_is_magnified(rng: torch.Generator) -> None:
    k = torch.randn(20, 2, generator=rng, dtype=torch.float64) * 0.1
    assert not odd_phase(k, KRIOS).any()
    both = replace(KRIOS, beam_tilt=(0.3, -0.2), odd_zernike=(0.5, -1.0, 20.0, 3.0, -4.0, 10.0))
    phase = odd_phase(k, both)
    torch.testing.assert_close(odd_phase(-k, both), -phase)
    apart = odd_phase(k, replace(both, odd_zernike=())) + odd_phase(k, replace(both, beam_tilt=(0.0, 0.0)))
    torch.testing.assert_close(phase, apart)
    matrix = torch.tensor(MAGNIFICATION, dtype=torch.float64).reshape(2, 2)
    torch.testing.assert_close(odd_phase(k, replace(both, magnification=MAGNIFICATION)), odd_phase(k @ matrix.T, both))
