"""Fourier shell correlation and what is corrected in it (spec/refinement 3.7, 4.8; spec/processing 7.2, 7.3)."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.maths.filters import apply_spectrum, frequency_radii, power_spectrum
from frazil.maths.fsc import corrected_fsc, first_below, fsc, fsc_of_transforms, randomise_phases, resolution_at
from frazil.maths.masks import soft_sphere


def noise(rng: torch.Generator, box: int = 24) -> Tensor:
    return torch.randn(box, box, box, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("box", [12, 16])
def test_is_the_written_sum_over_the_whole_transform(box: int, rng: torch.Generator) -> None:
    a, b = noise(rng, box), noise(rng, box)
    b += 0.7 * a
    fa, fb = torch.fft.fftn(a), torch.fft.fftn(b)
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64).square()
    shell = ((k[:, None, None] + k[:, None] + k).sqrt() + 0.5).floor()
    curve = fsc(a, b)
    assert curve.shape == (box // 2 + 1,) and curve.dtype == torch.float64 and curve[0] == 1
    for r in range(1, box // 2 + 1):
        s = shell == r
        expected = (fa[s] * fb[s].conj()).sum().real / (fa[s].abs().square().sum() * fb[s].abs().square().sum()).sqrt()
        assert curve[r].item() == pytest.approx(expected.item(), abs=1e-12)


def test_of_a_map_with_itself_its_negative_and_nothing(rng: torch.Generator) -> None:
    a = noise(rng).float()
    torch.testing.assert_close(fsc(a, 3 * a + 2), torch.ones(13, dtype=torch.float64))
    torch.testing.assert_close(fsc(a, -a)[1:], -torch.ones(12, dtype=torch.float64))
    assert fsc(a, torch.zeros_like(a)).tolist() == [1.0] + [0.0] * 12
    with pytest.raises(ValueError, match="different size"):
        fsc(a, noise(rng, 16))


def test_signal_with_noise_has_ssnr_over_one_plus_ssnr(rng: torch.Generator) -> None:
    """Two maps of one white signal with independent noise that grows by shell."""
    box = 32
    ssnr = torch.logspace(1, -1, box // 2 + 1, dtype=torch.float64)
    signal = apply_spectrum(noise(rng, box), ssnr.sqrt())
    curve = fsc(signal + noise(rng, box), signal + noise(rng, box))
    n = torch.bincount((frequency_radii(box) + 0.5).floor().long().flatten())[: box // 2 + 1]
    expected = ssnr / (1 + ssnr)
    assert ((curve - expected).abs()[2:] < 4 / n.sqrt()[2:]).all()


def test_rings_of_images_too(rng: torch.Generator) -> None:
    a, b = torch.randn(2, 16, 16, generator=rng, dtype=torch.float64)
    curve = fsc_of_transforms(torch.fft.rfft2(a), torch.fft.rfft2(a + b), 16)
    assert curve.shape == (9,) and 0.3 < curve[4:].mean() < 0.95


def test_resolution_is_the_last_shell_before_the_first_drop() -> None:
    curve = torch.tensor([1, 0.9, 0.8, 0.15, 0.14, 0.5, 0.1, 0.0, 0.0], dtype=torch.float64)
    assert resolution_at(curve, 0.143, 16, 2.0) == pytest.approx(32 / 3)  # the later rise does not count
    assert resolution_at(curve, 0.5, 16, 2.0) == 16
    assert resolution_at(torch.ones(9), 0.143, 16, 2.0) == 4.0  # never below: Nyquist
    assert resolution_at(torch.tensor([1.0, 0.1, 0.9]), 0.143, 4, 2.0) == 999.0
    assert first_below(curve, 0.143) == 4 and first_below(torch.ones(5), 0.5) is None


def test_random_phases_keep_every_amplitude_and_the_inner_shells(rng: torch.Generator) -> None:
    volume = noise(rng)
    before = volume.clone()
    made = randomise_phases(volume, 6, torch.Generator().manual_seed(1))
    old, new, r = torch.fft.rfftn(volume), torch.fft.rfftn(made), frequency_radii(24)
    torch.testing.assert_close(new.abs(), old.abs())  # fails on the kx = 0 plane unless the phases are Hermitian there
    torch.testing.assert_close(new[r < 5.5], old[r < 5.5])
    turned = (new / old)[(r >= 5.5) & (r < 11.5)]
    assert turned.mean().abs() < 5 / math.sqrt(len(turned)) and torch.equal(volume, before)
    assert fsc(volume, made)[7:].abs().max() < 0.25 and fsc(volume, made)[1:6].min() > 1 - 1e-12


def test_random_phases_follow_their_generator(rng: torch.Generator) -> None:
    volume = noise(rng).float()
    first, again, other = (randomise_phases(volume, 3, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert fsc(first, other)[4:].abs().max() < 0.5 < fsc(first, again)[4:].min()


def test_the_halves_get_different_phases(rng: torch.Generator) -> None:
    """With one stream, equal halves would stay equal and everything would be put down to the mask."""
    volume, mask = noise(rng), torch.ones(24, 24, 24, dtype=torch.float64)
    found = corrected_fsc(volume, volume, mask, seed=3, randomise_from=5)
    assert found.randomise_from == 5
    assert found.randomised[6:].abs().max() < 0.25
    torch.testing.assert_close(found.corrected, torch.ones(13, dtype=torch.float64))


def test_correlation_that_the_mask_makes_is_removed(rng: torch.Generator) -> None:
    """Independent noise in a tight mask after a common low-resolution signal: processing 7.3 (b)."""
    box = 32
    low = (torch.arange(box // 2 + 1) <= 5).double()
    signal = apply_spectrum(noise(rng, box), 3 * low) + 2 * soft_sphere(box, 6, 3, dtype=torch.float64)
    tight = soft_sphere(box, 5, 2, dtype=torch.float64)
    found = corrected_fsc(signal + noise(rng, box), signal + noise(rng, box), tight, seed=1)
    start = found.randomise_from
    assert start is not None and 4 <= start <= 7
    assert (found.unmasked[1:start] >= 0.8).all() and found.unmasked[start] < 0.8
    assert torch.equal(found.corrected[: start + 2], found.masked[: start + 2])
    tail = slice(start + 3, None)
    assert found.corrected[tail].mean() < 0.15
    m, n = found.masked[start + 2 :], found.randomised[start + 2 :]
    expected = torch.where(n > m, 0, (m - n) / (1 - n))
    torch.testing.assert_close(found.corrected[start + 2 :], expected)


def test_signal_inside_the_mask_survives_the_correction(rng: torch.Generator) -> None:
    """Signal in the middle, noise everywhere: the corrected curve is that of the noise inside, well above the unmasked one."""
    box = 32
    mask = soft_sphere(box, 8, 4, dtype=torch.float64)
    signal = noise(rng, box) * soft_sphere(box, 7, 3, dtype=torch.float64)
    found = corrected_fsc(signal + noise(rng, box), signal + noise(rng, box), mask, seed=2, randomise_from=4)
    inside = found.corrected[6:]
    assert inside.mean() == pytest.approx(0.42, abs=0.1) and found.unmasked[6:].mean() < 0.1  # SNR within the mask's edge is about 0.7
    again = corrected_fsc(signal, signal, mask, seed=2)
    assert again.randomise_from is None and not again.randomised.any() and torch.equal(again.corrected, again.masked)


def test_seed_decides_the_result_and_inputs_stay(rng: torch.Generator) -> None:
    a, b, mask = noise(rng), noise(rng), soft_sphere(24, 6, 3, dtype=torch.float64)
    copies = a.clone(), b.clone(), mask.clone()
    one, same, other = (corrected_fsc(a, b, mask, seed=s, randomise_from=3).randomised for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert all(torch.equal(x, y) for x, y in zip(copies, (a, b, mask), strict=True))
    assert power_spectrum(a).shape == one.shape
