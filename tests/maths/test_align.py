"""Alignment of frames: exact shifts, the likelihood's gradient and information, fixed patterns."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.align import (
    LEAST_NOISE,
    _choose_prior,
    _evaluate,
    _finish,
    _Prior,
    _State,
    correlate_track,
    crop_reduced,
    fit_motion,
    local_basis,
    make_patches,
    reduced_transform,
    shift_phases,
)

SIZE = (192, 256)


def texture(rng: torch.Generator, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Transform of a 1/f image of variance about 1."""
    ky, kx = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    ft = torch.fft.rfft2(torch.randn(size, generator=rng)) / (0.02 + (ky.square() + kx.square()).sqrt())
    ft[size[0] // 2] = 0
    ft[:, -1] = 0
    ft[0, 0] = 0
    return ft / torch.fft.irfft2(ft, s=size).std()


def moved(ft: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Frames whose content is moved by shifts (f, 2) xy."""
    ky, kx = torch.fft.fftfreq(SIZE[0])[:, None], torch.fft.rfftfreq(SIZE[1])[None]
    return torch.stack([torch.fft.irfft2(ft * torch.exp(-2j * torch.pi * (kx * x + ky * y)), s=SIZE) for x, y in shifts.tolist()])


def track_of(frames: int) -> torch.Tensor:
    t = torch.linspace(0, 1, frames, dtype=torch.float64)
    return torch.stack([-5 * (1 - torch.exp(-4 * t)), 3.3 * t], -1)


def test_reduced_transform_is_the_cropped_transform(rng: torch.Generator) -> None:
    image = torch.randn(SIZE, generator=rng)
    whole = torch.fft.rfft2(image)
    reduced = reduced_transform(image, (96, 120))
    assert torch.allclose(reduced[5, :60], whole[5, :60], atol=1e-3)
    assert torch.allclose(reduced[-7, :60], whole[-7, :60], atol=1e-3)
    assert reduced[48].abs().max() == 0 and reduced[0, 0] == 0
    assert torch.equal(crop_reduced(reduced, (40, 50))[3, :20], reduced[3, :20])
    y, x = shift_phases((96, 120), SIZE, torch.tensor([2.0, -3.0]))
    rolled = reduced_transform(torch.roll(image, (-3, 2), (0, 1)), (96, 120))
    assert torch.allclose(reduced * y * x, rolled, atol=1e-2)


def test_noise_free_shifts(rng: torch.Generator) -> None:
    """Integer and fractional shifts of 20 frames: below 0.02 px after the fit, below 0.2 px by correlation alone."""
    truth = track_of(20)
    frames = moved(texture(rng), -truth) + 1e-3 * torch.randn(20, *SIZE, generator=rng)
    ft = torch.stack([reduced_transform(f, (96, 128)) for f in frames])
    first = correlate_track(ft, SIZE, 150.0, 20.0)
    assert (first - truth).abs().max() < 0.2
    patches = make_patches(ft, SIZE, first, (2, 2), 0.25)
    fit = fit_motion(patches, torch.ones(20, len(patches.radius)), first, local=False)
    assert (fit.track - truth).abs().max() < 0.02


def test_noise_and_the_expected_error(rng: torch.Generator) -> None:
    """At low signal the found error is what the information promises, and smoothness helps."""
    truth = track_of(20)
    frames = moved(texture(rng), -truth) + 7 * torch.randn(20, *SIZE, generator=rng)
    ft = torch.stack([reduced_transform(f, (96, 128)) for f in frames])
    patches = make_patches(ft, SIZE, truth, (2, 2), 0.25)
    left = torch.ones(20, len(patches.radius))
    errors = {}
    for smooth in (True, False):
        fit = fit_motion(patches, left, truth + 0.3 * torch.randn(20, 2, generator=rng, dtype=torch.float64), False, smooth)
        off = fit.track - truth
        errors[smooth] = float((off - off.mean(0)).square().mean().sqrt())
        assert errors[smooth] < 3 * fit.error
    assert errors[True] < errors[False]


def test_gradient_is_that_of_the_likelihood(rng: torch.Generator) -> None:
    truth = track_of(6)
    frames = moved(texture(rng), -truth) + torch.randn(6, *SIZE, generator=rng)
    ft = torch.stack([reduced_transform(f, (96, 128)) for f in frames])
    patches = make_patches(ft, SIZE, truth, (1, 1), 0.2)
    left = 0.9 ** torch.arange(6.0)[:, None].expand(6, len(patches.radius))
    at = 0.4 * torch.randn(6, 1, 2, generator=rng, dtype=torch.float64)
    state = _evaluate(patches, left, at)
    squares = left.double().square()
    noise = (1 - state.ssnr * squares.mean(0)).clamp(min=LEAST_NOISE)
    weight = (state.ssnr / (noise * (noise + state.ssnr * squares.sum(0))))[patches.bins]

    def likelihood(shifts: torch.Tensor) -> float:
        phase = torch.exp(-2j * torch.pi * (shifts[:, 0] @ patches.k.double().T))
        total = (patches.values[0].to(torch.complex128) * phase * left.double()[:, patches.bins]).sum(0)
        return float((weight * total.abs().square()).sum()) * patches.independence

    for f, axis in ((0, 0), (3, 1)):
        step = torch.zeros_like(at)
        step[f, 0, axis] = 1e-4
        slope = (likelihood(at + step) - likelihood(at - step)) / 2e-4
        assert float(state.slope[0, f, axis]) == pytest.approx(slope, rel=2e-3, abs=1e-2 * float(state.slope.abs().max()))
    assert state.laplacian.sum(1).abs().max() < 1e-9 * state.laplacian.max()  # moving all frames together changes nothing


def test_information_grows_with_the_signal_as_it_should(rng: torch.Generator) -> None:
    """The values' power holds their signal. Taken for noise, a signal four times the noise would hardly count more than an equal one.

    With s the signal-to-noise power of n frames, information goes with s² (n − 1) / (1 + s n).
    """
    image, found = torch.randn(SIZE, generator=rng), []
    for noise in (1.0, 0.5):
        frames = image + noise * torch.randn(8, *SIZE, generator=rng)
        ft = torch.stack([reduced_transform(f, (96, 128)) for f in frames])
        patches = make_patches(ft, SIZE, torch.zeros(8, 2, dtype=torch.float64), (1, 1), 0.2)
        state = _evaluate(patches, torch.ones(8, len(patches.radius)), torch.zeros(8, 1, 2, dtype=torch.float64))
        found.append(float(state.laplacian.diagonal().mean()))
    assert found[1] / found[0] == pytest.approx((16 / 33) / (1 / 9), rel=0.1)


def test_local_motion_has_no_mean_over_the_field(rng: torch.Generator) -> None:
    """A bowl, X² + Y², moves the whole frame too: that part is the track's."""
    place = torch.cartesian_prod(*(torch.linspace(0.1, 0.9, 5, dtype=torch.float64),) * 2)
    basis = local_basis(8, place)
    theta = torch.cat([torch.zeros(8, 2, dtype=torch.float64), torch.randn(basis.shape[-1], 2, generator=rng, dtype=torch.float64)])
    count = len(place)
    state = _State(torch.zeros(count, 8, 2, dtype=torch.float64), torch.eye(8, dtype=torch.float64), torch.ones(3), torch.ones(3))
    fit = _finish(state, basis, theta, _Prior.weakest(8, basis.shape[-1], count), 1)
    whole = basis @ theta[8:]
    assert whole.mean(1).abs().max() > 0.01 and fit.local.mean(1).abs().max() < 1e-12
    assert torch.allclose(fit.track[:, None] + fit.local, whole)


def test_the_evidence_sees_that_the_first_frames_are_livelier(rng: torch.Generator) -> None:
    """A track that slows down over its first fifth: late frames are smoothed, the first ones are not."""
    t = torch.arange(24, dtype=torch.float64)
    truth = torch.stack([6 * (1 - torch.exp(-t / 4)), 0.05 * t], -1)
    normal = 150 * (torch.eye(24, dtype=torch.float64) - 1 / 24) + 1e-6
    found = truth - truth.mean(0) + 150**-0.5 * torch.randn(24, 2, generator=rng, dtype=torch.float64)
    prior = _choose_prior(_Prior.weakest(24, 0, 1), normal, normal @ found, True)
    assert prior.early[0] > 1
    fitted = torch.linalg.solve(normal + prior.matrix, normal @ found)
    off = [float((x - x.mean(0)).square().mean().sqrt()) for x in (fitted - truth, found - truth)]
    assert off[0] < 0.7 * off[1]


def test_a_specimen_at_rest_stays_at_rest_under_a_fixed_pattern(rng: torch.Generator) -> None:
    pattern = 1 + 0.01 * torch.randn(SIZE, generator=rng)
    signal = 1 + 0.05 * torch.fft.irfft2(texture(rng), s=SIZE)
    frames = torch.stack([torch.poisson(40 * signal * pattern, generator=rng) for _ in range(12)])
    ft = torch.stack([reduced_transform(f, (96, 128)) for f in frames])
    first = correlate_track(ft, SIZE)
    patches = make_patches(ft, SIZE, first, (2, 2), 0.25)
    assert fit_motion(patches, torch.ones(12, len(patches.radius)), first, False).track.abs().max() < 0.1
