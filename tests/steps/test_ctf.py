"""steps/ctf.py on simulated micrographs with known defocus, on noise, and on real spectra and micrographs."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frazil.data import BadInput, Optics
from frazil.io.mrc import read_mrc
from frazil.io.star import read_star
from frazil.maths.rings import equivalent, fit_resolution
from frazil.maths.thon import theta_of
from frazil.simulate.ctf import CtfMicrographSettings, noise_micrograph, simulate_ctf_micrograph
from frazil.steps.ctf import WORST, CtfResult, CtfSettings, estimate_ctf, micrograph_spectrum, saved_spectrum, tile_layout

OPTICS = Optics(1.2)
TRUTH = torch.tensor([14600.0, 13900.0, -40.0], dtype=torch.float64)
SMALL = CtfMicrographSettings((1024, 1024), dose=40.0, particles=20)


def found_in(image: torch.Tensor, optics: Optics = OPTICS, settings: CtfSettings | None = None) -> CtfResult:
    settings = settings or CtfSettings()
    return estimate_ctf(micrograph_spectrum(image, optics.pixel_size, settings), optics, settings)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return simulate_ctf_micrograph(OPTICS, SMALL, TRUTH)


def test_a_micrograph_gives_its_defocus(image: torch.Tensor) -> None:
    before = image.clone()
    result = found_in(image)
    assert result.found and not result.flags and torch.equal(image, before)
    assert float(result.defocus[:2].mean()) == pytest.approx(14250, abs=50)
    assert float(result.defocus[0] - result.defocus[1]) == pytest.approx(700, abs=120)
    assert float(result.defocus[2]) == pytest.approx(-40, abs=5)
    assert 3 < result.resolution < 7 and 0.05 < result.fom < 0.5 and result.phase_shift == 0
    assert abs(float(result.defocus[:2].mean()) - 14250) < 4 * result.error[0] < 150
    high = result.curves.k > 0.25
    assert float(result.curves.correlation[~high][10:60].min()) > 0.5


def test_binned_and_whole_micrograph_have_the_same_defocus(image: torch.Tensor) -> None:
    """Pixel sizes are kept track of: half the pixels, twice the size; and integers of any type."""
    ft = torch.fft.fftshift(torch.fft.rfft2(image), 0)[192:832, :321]
    binned = torch.fft.irfft2(torch.fft.ifftshift(ft, 0), s=(640, 640))
    settings = CtfSettings(finest=5.0)
    whole, half = found_in(image, OPTICS, settings), found_in(binned, replace(OPTICS, pixel_size=1.2 * 1024 / 640), settings)
    assert float((whole.defocus[:2].mean() - half.defocus[:2].mean()).abs()) < 30
    integers = found_in(image.to(torch.uint8), OPTICS, settings)
    assert float((whole.defocus - integers.defocus).abs().max()) < 1e-3


def test_spectrum_and_micrograph_agree(image: torch.Tensor) -> None:
    """The picture of a micrograph's spectrum is what motion correction would save; its pixel size goes with it."""
    settings = CtfSettings()
    spectrum = micrograph_spectrum(image, 1.2, settings)
    result = estimate_ctf(saved_spectrum(spectrum.picture, spectrum.picture_pixel, settings), OPTICS, settings)
    assert float(result.defocus[:2].mean()) == pytest.approx(14250, abs=60)
    assert (float(result.defocus[2]) + 40 + 90) % 180 - 90 == pytest.approx(0, abs=8)
    assert math.isnan(result.tilt[0])


def test_tiles_taken_together_give_the_same_spectrum(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, several at a time, moved to where the fit is; a tile of one value is left out."""
    holed = image.clone()
    side = tile_layout((1024, 1024), 1.2)[0]
    holed[:side, :side] = holed.mean()
    one = micrograph_spectrum(holed, 1.2, CtfSettings())
    monkeypatch.setattr("frazil.steps.ctf.ON_CPU", 4)
    several = micrograph_spectrum(holed, 1.2, CtfSettings()).on(one.bins)
    torch.testing.assert_close(several.tiles, one.tiles, rtol=1e-5, atol=0)
    torch.testing.assert_close(several.picture, one.picture, rtol=1e-4, atol=1e-4)
    whole = micrograph_spectrum(image, 1.2, CtfSettings())
    assert torch.equal(several.place, one.place) and len(one.tiles) == len(one.place) < len(whole.tiles)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_has_no_fit(seed: int) -> None:
    result = found_in(noise_micrograph(OPTICS, replace(SMALL, seed=seed, inelastic=0.05 * seed)))
    assert not result.found and result.resolution == WORST and result.flags == ["no Thon rings found"] and abs(result.fom) < 0.05


def test_a_phase_plate(image: torch.Tensor) -> None:
    shifted = simulate_ctf_micrograph(OPTICS, SMALL, torch.tensor([9000.0, 8800.0, 10.0], dtype=torch.float64), 85.0)
    result = found_in(shifted, OPTICS, CtfSettings(phase_plate=True, phases=(0.0, 180.0, 20.0)))
    assert result.phase_shift == pytest.approx(85, abs=8)
    assert float(result.defocus[:2].mean()) == pytest.approx(8900, abs=100)


def test_ice_is_told_and_changes_nothing(image: torch.Tensor) -> None:
    icy = found_in(simulate_ctf_micrograph(OPTICS, replace(SMALL, ice_ring=3.0), TRUTH))
    assert any(flag.startswith("ice ring") for flag in icy.flags) and icy.ice > 3 * abs(found_in(image).ice) + 1
    assert float(icy.defocus[:2].mean()) == pytest.approx(14250, abs=50)


def test_a_tilted_field_is_told() -> None:
    settings = CtfMicrographSettings((1536, 1536), dose=40.0, tilt=25.0, tilt_direction=30.0, particles=20)
    result = found_in(simulate_ctf_micrograph(OPTICS, settings, TRUTH))
    assert result.tilt[0] == pytest.approx(25, abs=6) and abs(result.tilt[2] - 30) < 15
    assert any("tilted" in flag for flag in result.flags)
    assert float(result.defocus[:2].mean()) == pytest.approx(14250, abs=100)


def test_a_defocus_outside_the_range_is_told(image: torch.Tensor) -> None:
    result = found_in(image, OPTICS, CtfSettings(low=14500, high=30000))
    assert any("limit of the range" in flag for flag in result.flags)


@pytest.mark.parametrize("image, said", [
    (torch.full((256, 256), 7.0), "same value"), (torch.full((256, 256), math.nan), "not finite"), (torch.randn(64, 300), "128 x 128"),
])  # fmt: skip
def test_micrographs_that_cannot_be_used(image: torch.Tensor, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        micrograph_spectrum(image, 1.2, CtfSettings())


@pytest.mark.parametrize("spectrum, said", [
    (torch.ones(256, 200), "square"), (torch.ones(256, 256), "all the same"), (torch.full((256, 256), math.inf), "not finite"),
    (torch.randn(256, 256), "negative"),
])  # fmt: skip
def test_spectra_that_cannot_be_used(spectrum: torch.Tensor, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        saved_spectrum(spectrum, 1.4, CtfSettings())


@pytest.mark.parametrize("shape, pixel", [((4096, 4096), 0.66), ((4092, 5760), 0.83), ((1200, 1240), 1.5), ((400, 400), 1.4)])
def test_tiles_cover_the_micrograph(shape: tuple[int, int], pixel: float) -> None:
    side, rows, columns = tile_layout(shape, pixel)
    assert side <= min(shape) and side % 2 == 0
    for starts, length in ((rows, shape[0]), (columns, shape[1])):
        assert starts[0] == 0 and starts[-1] + side == length or len(starts) == 1
        assert all(b - a <= side for a, b in zip(starts, starts[1:], strict=False))


def test_equal_phases_meet_at_equal_frequencies(rng: torch.Generator) -> None:
    k = 0.05 + 0.25 * torch.rand(200, 1, generator=rng, dtype=torch.float64)
    angle = math.pi * torch.rand(200, 1, generator=rng, dtype=torch.float64)
    terms = torch.cat([k**2, k**2 * torch.cos(2 * angle), k**2 * torch.sin(2 * angle), k**4], -1).T
    theta = theta_of(TRUTH, torch.tensor(0.0, dtype=torch.float64))
    at = equivalent(terms, theta, OPTICS)
    lam2 = 0.0196876**2
    direction = theta[:3] @ terms[:3] - 0.5 * 2.7e7 * lam2 * terms[3]
    torch.testing.assert_close(theta[0] * at**2 - 0.5 * 2.7e7 * lam2 * at**4, direction, rtol=1e-6, atol=0)


def test_resolution_ends_where_the_correlation_falls() -> None:
    k = torch.linspace(0.03, 0.33, 300, dtype=torch.float64)
    phase = math.pi * 0.0197 * 15000 * k**2
    step = torch.where(k < 0.2, 0.9, 0.3)
    assert fit_resolution(k, step, phase) == pytest.approx(5.0, rel=0.01)
    assert fit_resolution(k, torch.full_like(k, 0.05), phase) == math.inf
    assert fit_resolution(k, torch.full_like(k, 0.9), phase) == pytest.approx(1 / 0.33, rel=0.01)
    assert fit_resolution(k, torch.full_like(k, 0.9), 20 * phase) > 6  # aliased rings do not count


@pytest.mark.real
def test_real_spectra_against_ctffind(shared_data: Path) -> None:
    """Within 100 Å of CTFFIND 4.1.14 on all twelve with the default range: none in the trap at 3 to 5 µm."""
    folder, settings = shared_data / "power_spectra_10204", CtfSettings()
    off, astigmatism = [], []
    for row in read_star(folder / "reference_ctf.star")["micrographs"].to_dict("records"):
        saved = read_mrc(folder / row["rlnMicrographName"].replace(".mrc", "_PS.mrc"))
        result = estimate_ctf(saved_spectrum(saved.data[0], saved.pixel_size, settings), Optics(0.885, 0, 200.0, 1.4), settings)
        u, v, angle = result.defocus.tolist()
        off.append(abs((u + v - row["rlnDefocusU"] - row["rlnDefocusV"]) / 2))
        astigmatism.append(abs(u - v - row["rlnDefocusU"] + row["rlnDefocusV"]))
        assert result.found and abs(angle - row["rlnDefocusAngle"]) < 10
        assert abs(result.resolution - row["rlnCtfMaxResolution"]) < 0.6
    assert len(off) == 12 and max(off) < 100 and sorted(off)[6] < 30 and sorted(astigmatism)[6] < 60


@pytest.mark.real
def test_a_real_micrograph_is_stable(shared_data: Path) -> None:
    """Left and right half, and interleaved tiles, of one apoferritin micrograph (no Cs) agree; drift blurs one direction."""
    found = read_mrc(shared_data / "apoferritin_10146" / "May08_05.53.51.mrc")
    optics, settings = Optics(found.pixel_size, cs=0.0), CtfSettings()
    spectrum = micrograph_spectrum(found.data[0], optics.pixel_size, settings)
    odd, even = (estimate_ctf(replace(spectrum, tiles=spectrum.tiles[i::2], place=spectrum.place[i::2]), optics, settings) for i in (0, 1))
    left, right = found_in(found.data[0][:, :620], optics), found_in(found.data[0][:, 620:], optics)
    for a, b in ((odd, even), (left, right)):
        assert a.found and b.found and abs(float(a.defocus[:2].mean() - b.defocus[:2].mean())) < 100
    assert float(odd.defocus[:2].mean()) == pytest.approx(19200, abs=150)
