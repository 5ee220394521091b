"""Motion correction of whole movies, simulated with known motion, and its exact cases."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.data import BadInput, Optics, Volume
from frazil.maths.motion import total_shift
from frazil.simulate.movies import MovieSettings, SimulatedMovie, simulate_movie
from frazil.simulate.phantom import density, phantom
from frazil.steps.motion import MotionSettings, correct_motion, group_starts, spread, usable_frames

OPTICS = Optics(2.0)


class Stack:
    """Frames in memory."""

    def __init__(self, frames: torch.Tensor) -> None:
        self.frames, self.shape = frames, tuple(frames.shape)
        self.loads = 0

    def load(self, start: int, stop: int) -> torch.Tensor:
        self.loads += 1
        return self.frames[start:stop].clone()


@pytest.fixture(scope="module")
def movie() -> tuple[SimulatedMovie, torch.Tensor]:
    shape = density(phantom(48, 2.0, seed=2), 48, 2.0)
    protein = Volume(shape.data * (1.5 / shape.data.max()), 2.0)
    settings = MovieSettings(384, 400, 10, dose=6.0, drift_px=6.0, local_px=2.0, particles=50, defocus=(14000.0, 13800.0, 20.0))
    made = simulate_movie(protein, OPTICS, settings)
    return made, torch.stack([made.counts(f).clamp(max=255).to(torch.uint8) for f in range(10)])


def test_simulated_phases_follow_the_interaction_constant() -> None:
    """σ = 2π m e λ / h² (m relativistic) is 6.526e-4 rad/(V Å) at 300 kV; a scattering density of 1/Å² is a potential of 47.878 V."""
    blob = density(phantom(32, 2.0, seed=2), 32, 2.0)
    made = simulate_movie(blob, OPTICS, MovieSettings(96, 96, 2, particles=1, solvent_contrast=1.0))
    phase = float(made.stamps.double().sum()) / float(blob.data.double().sum())
    assert phase == pytest.approx(6.526e-4 * 47.878 * 2.0, rel=0.04)  # views are interpolated


def test_known_motion_is_found_and_undone(movie) -> None:
    """Track and field of a movie with drift, local motion, gain, hot and dead pixels; the sum shows the particles of frame 0."""
    made, frames = movie
    source = Stack(frames)
    settings = MotionSettings(dose=6.0, even_odd=True, no_dose_weighting=True, patches=(4, 4), spectrum_size=128, aligned_frames=True)
    result = correct_motion(source, OPTICS, settings, gain=made.gain)
    line = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    place = torch.cartesian_prod(line, line)
    truth = -made.motion(place)

    def error(coefficients: torch.Tensor | None) -> float:
        off = total_shift(result.track, coefficients, place) - truth
        return float((off - off.mean(0)).square().sum(-1).mean().sqrt())

    # The field starts faster than a cubic in time can; what is left is mostly frame 1 at the corners.
    assert result.coefficients is not None and error(result.coefficients) < min(0.45, 0.6 * error(None))
    centre = (result.track - truth.mean(1))[1:]
    assert (centre - centre.mean(0)).square().sum(-1).mean().sqrt() < 0.2
    assert result.track[0].abs().max() == 0 and result.fit.error < 0.15
    assert {tuple(p) for p in made.hot.tolist()} <= {tuple(p) for p in result.bad.tolist()}
    at_rest = made.clean(0) - 1

    def agreement(image: torch.Tensor) -> float:
        inner = [t[20:-20, 20:-20] - t[20:-20, 20:-20].mean() for t in (image, at_rest)]
        return float((inner[0] * inner[1]).sum() / (inner[0].norm() * inner[1].norm()))

    assert result.even is not None and result.odd is not None and result.no_dw is not None and result.aligned is not None
    still = agreement((frames.float() * made.gain).sum(0))
    assert agreement(result.no_dw) > 1.5 * still and agreement(result.micrograph) > 1.5 * still
    assert torch.allclose(result.even + result.odd, result.micrograph, atol=1e-2)
    assert torch.allclose(result.aligned.sum(0), result.no_dw, atol=0.02 * float(result.no_dw.std()))
    assert result.spectrum is not None and result.spectrum.shape == (128, 128) and result.spectrum_pixel == pytest.approx(2.0, rel=0.02)


def test_frames_that_do_not_fit_memory_are_read_again_with_the_same_result(movie) -> None:
    _, frames = movie
    few = Stack(frames[:4]), Stack(frames[:4])
    settings = MotionSettings(dose=6.0, patches=(1, 1))
    kept = correct_motion(few[0], OPTICS, settings)
    again = correct_motion(few[1], OPTICS, MotionSettings(dose=6.0, patches=(1, 1), memory=1))
    assert few[0].loads == 1 and few[1].loads == 3 + 4 + 1  # three passes, and single frames for the power spectrum
    # Frames fit here with the transforms of the alignment, but not with those of the power spectrum, which are four times as large.
    partly = Stack(frames[:4])
    third = correct_motion(partly, OPTICS, MotionSettings(dose=6.0, patches=(1, 1), memory=frames[:4].numel()))
    assert partly.loads == 1
    for other in (again, third):
        assert torch.equal(kept.micrograph, other.micrograph) and torch.equal(kept.track, other.track)
        assert kept.spectrum is not None and other.spectrum is not None and torch.allclose(kept.spectrum, other.spectrum, rtol=1e-4)


def test_identical_frames_add_up(rng: torch.Generator) -> None:
    """No motion: the sum is n frames, dose-weighted √n at DC; binning keeps the mean."""
    one = torch.poisson(torch.full((96, 100), 20.0), generator=rng).to(torch.int16)
    stack = Stack(one[None].repeat(6, 1, 1))
    plain = correct_motion(stack, Optics(1.0), MotionSettings(patches=(1, 1), hot=50.0, spectrum_size=0))
    assert plain.track.abs().max() < 0.01 and torch.allclose(plain.micrograph, 6 * one.float(), atol=0.5)
    weighted = correct_motion(stack, Optics(1.0), MotionSettings(patches=(1, 1), dose=2.0, hot=50.0, bin=2.0, spectrum_size=0))
    assert weighted.micrograph.shape == (48, 50) and weighted.pixel_size == 2.0
    assert float(weighted.micrograph.mean()) == pytest.approx(math.sqrt(6) * float(one.float().mean()), rel=1e-4)


def test_empty_frames_are_left_out_and_hopeless_movies_refused(movie) -> None:
    _, frames = movie
    holes = frames[:6].clone()
    holes[2] = 0
    result = correct_motion(Stack(holes), OPTICS, MotionSettings(dose=6.0, patches=(1, 1)))
    assert result.observed.tolist() == [True, True, False, True, True, True] and "3" in result.notes[0]
    for bad, said in ((torch.zeros(4, 64, 64, dtype=torch.uint8), "same value"),
                      (torch.full((4, 64, 64), 255, dtype=torch.uint8), "saturated"),
                      (torch.cat([frames[:1], 0 * frames[:3]]), "only 1 of 4 frames"), (torch.full((3, 64, 64), math.nan), "not "
                          "finite")):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            correct_motion(Stack(bad), OPTICS, MotionSettings())


def test_saturated_frames_are_left_out(movie) -> None:
    _, frames = movie
    settings = MotionSettings(dose=6.0, patches=(1, 1), spectrum_size=64)
    some = torch.tensor([True, True, False, True, False, True, True])
    spoilt = frames[:7].clone()
    spoilt[2] = 255  # all of it
    spoilt[4] = 255
    spoilt[4, ::7, ::5] = 0  # but for dead pixels: not one value, yet many times the counts of the others
    result = correct_motion(Stack(spoilt), OPTICS, settings)
    assert result.observed.tolist() == some.tolist()
    assert result.notes == ["frames with one value everywhere left out: 3", "frames of more than 4 times the usual counts left out: 5"]
    dark = torch.where(some[:, None, None], spoilt, torch.zeros_like(spoilt))  # known to be left out
    without = correct_motion(Stack(dark), OPTICS, settings)
    assert torch.equal(result.track, without.track) and torch.equal(result.bad, without.bad)
    assert torch.allclose(result.micrograph, without.micrograph, atol=1e-4)
    assert result.spectrum is not None and without.spectrum is not None
    assert torch.allclose(result.spectrum, without.spectrum, rtol=1e-4)


def test_which_frames_count() -> None:
    def observed(means: list[float], flat: tuple[int, ...] = ()) -> list[bool]:
        values = torch.tensor(means, dtype=torch.float64)
        return usable_frames(values, torch.arange(4.0), torch.tensor([i in flat for i in range(len(means))]))[0].tolist()

    assert observed([3.0, 2.5, 1.0, 1.0, 0.9, 1.1]) == [True] * 6  # a real first frame may have three times the dose
    assert observed([1.0, 1.0, 1.0, 1.0, 5.0]) == [True] * 4 + [False]
    assert observed([255.0, 255.0, 255.0, 2.0, 2.1], flat=(0, 1, 2)) == [False] * 3 + [True] * 2  # most are saturated
    assert observed([0.0, 0.0, 0.0, 2.0, 2.1], flat=(0, 1, 2)) == [False] * 3 + [True] * 2  # most are empty
    assert observed([1.0, 1.0, 7.0, 1.0], flat=(2,)) == [True, True, False, True]
    with pytest.raises(BadInput, match="only 1 of 3"):
        observed([255.0, 255.0, 3.0], flat=(0, 1))


def test_groups() -> None:
    assert group_starts(10, MotionSettings(dose=0.3)) == [0, 3, 6]
    assert group_starts(5, MotionSettings(group=2)) == list(range(5))  # fewer than three groups
    assert group_starts(4, MotionSettings(dose=1.2)) == [0, 1, 2, 3]
    observed = torch.tensor([False, True, True, False])
    assert spread(torch.tensor([[1.0], [2.0]]), observed)[:, 0].tolist() == [1, 1, 2, 2]
