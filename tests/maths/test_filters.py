"""Filters and shell spectra of maps (spec/refinement 2.3)."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.filters import (
    apply_spectrum,
    apply_to_ft,
    frequency_radii,
    friedel_weights,
    lowpass_map,
    lowpass_shell,
    lowpass_weights,
    power_spectrum,
    shell_average,
    shell_sums,
    shell_totals,
)


def test_lowpass_is_full_below_its_start_and_zero_two_shells_later() -> None:
    """64 px of 3.54 Å to 40 Å: N a/d = 5.664, so 1 up to 4.664 and 0 from 6.664."""
    r = torch.tensor([0.0, 4.0, 4.664, 5.164, 5.664, 6.164, 6.664, 7.0, 50.0], dtype=torch.float64)
    low, high = 0.5 - math.sqrt(0.125), 0.5 + math.sqrt(0.125)
    assert lowpass_weights(r, 64, 3.54, 40.0).tolist() == pytest.approx([1, 1, 1, high, 0.5, low, 0, 0, 0], abs=1e-9)
    assert lowpass_weights(r, 64, 3.54, 40.0, edge=0).tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("box", [16, 15])
def test_radii_and_weights_describe_the_whole_transform(box: int) -> None:
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64).square()
    whole = (k[:, None, None] + k[:, None] + k).sqrt()
    torch.testing.assert_close(frequency_radii(box), whole[..., : box // 2 + 1])
    torch.testing.assert_close(frequency_radii(box, 2), whole[0, :, : box // 2 + 1])
    counts = shell_sums(lambda rows: torch.ones(box, box, box // 2 + 1)[rows], box)
    expected = torch.bincount((whole + 0.5).floor().long().flatten())[: box // 2 + 1]
    assert torch.equal(counts.long(), expected)


def test_shell_sums_do_not_depend_on_how_the_volume_is_cut(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    half = torch.rand(12, 12, 7, generator=rng)
    whole = shell_average(half, 12)
    monkeypatch.setattr("frazil.maths.filters.PLANES", 5)
    torch.testing.assert_close(shell_average(half, 12), whole)


def test_parseval_of_the_power_spectrum(rng: torch.Generator) -> None:
    volume = torch.randn(14, 14, 14, generator=rng, dtype=torch.float64)
    power = torch.fft.rfftn(volume).abs().square() * friedel_weights(14)
    assert power.sum().item() == pytest.approx(volume.square().sum().item() * 14**3, rel=1e-12)
    assert power_spectrum(volume)[1:].mean().item() == pytest.approx(14**3, rel=0.1)  # white noise: |F|² = N³ in every shell
    assert power_spectrum(volume[0])[1:].mean().item() == pytest.approx(14**2, rel=0.3)


def test_lowpass_keeps_slow_waves_and_removes_fast_ones() -> None:
    c = torch.arange(32, dtype=torch.float64)
    slow, fast = (torch.cos(2 * math.pi * n * c / 32).expand(32, 32, 32) for n in (4, 9))
    filtered = lowpass_map(slow + fast, 2.0, 64 / 6.5)  # centred on shell 6.5
    torch.testing.assert_close(filtered, slow.contiguous(), atol=1e-12, rtol=0)
    halfway = lowpass_map(slow, 2.0, 16.0)  # centred on shell 4
    torch.testing.assert_close(halfway, 0.5 * slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("resolution", [60.0, 40.0, 12.0, 5.0, 3.0, 2.2, 2.0])
@pytest.mark.parametrize("edge", [0.0, 2.0, 5.0])
@pytest.mark.parametrize("box", [32, 33])
def test_lowpass_without_the_empty_part_is_the_whole_transforms(box: int, edge: float, resolution: float, rng: torch.Generator) -> None:
    data = torch.randn(box, box, box, generator=rng, dtype=torch.float64)
    expected = apply_to_ft(data, lambda r: lowpass_weights(r, box, 1.0, resolution, edge))
    torch.testing.assert_close(lowpass_map(data, 1.0, resolution, edge), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("box", [16, 15])
def test_totals_by_shell_count_friedel_mates(box: int, rng: torch.Generator) -> None:
    ft = torch.fft.rfftn(torch.randn(box, box, box, generator=rng, dtype=torch.float64))
    power = ft.real.square() + ft.imag.square()
    whole = shell_totals(lambda rows: (power[rows],), box)[0]
    torch.testing.assert_close(whole, shell_sums(lambda rows: power[rows], box))
    stored = shell_totals(lambda rows: (power[rows],), box, relion=True)[0]
    torch.testing.assert_close(stored, shell_sums(lambda rows: power[rows] / friedel_weights(box), box))


def test_images_are_filtered_one_by_one(rng: torch.Generator) -> None:
    stack = torch.randn(16, 16, 16, generator=rng, dtype=torch.float64)
    before = stack.clone()
    filtered = lowpass_map(stack, 1.0, 4.0, dims=2)
    torch.testing.assert_close(filtered[3], lowpass_map(stack[3], 1.0, 4.0, dims=2))
    assert (filtered - lowpass_map(stack, 1.0, 4.0)).abs().max() > 0.1
    assert torch.equal(stack, before) and filtered.dtype == torch.float64
    deep = lowpass_map(stack.reshape(4, 4, 16, 16), 1.0, 4.0, dims=2)
    torch.testing.assert_close(deep.reshape(16, 16, 16), filtered)


def test_apply_spectrum_scales_shells_and_drops_the_corners(rng: torch.Generator) -> None:
    volume = torch.randn(16, 16, 16, generator=rng, dtype=torch.float64)
    spectrum = torch.linspace(2, 0.5, 9, dtype=torch.float64)
    made = apply_spectrum(volume, spectrum)
    torch.testing.assert_close(power_spectrum(made), power_spectrum(volume) * spectrum**2)
    ft = torch.fft.rfftn(made).abs()
    assert ft[frequency_radii(16) >= 8.5].max() < 1e-10
    torch.testing.assert_close(made.mean(), volume.mean() * 2)


def test_a_low_pass_beyond_nyquist_ends_at_the_last_shell() -> None:
    assert [lowpass_shell(32, 6.0, d) for d in (48.0, 12.0, 2.0)] == [4, 16, 16]
