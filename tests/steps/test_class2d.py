"""2D classification of particles of known classes: EM and gradient steps, from nothing; resuming, centring, poses of 3D origin."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frazil.maths.filters import lowpass_map
from frazil.maths.rotation import random_rotations
from frazil.simulate.averages import agreement, particles_of, pictures
from frazil.steps.class2d import FORM, Class2dParams, GradientState, centred, class2d, initial_state, resolved
from frazil.steps.classify import ClassifyJob, iterate, make_engine

BOX, PIXEL, K, COUNT = 32, 4.0, 3, 300
DIAMETER = 0.8 * BOX * PIXEL


class Stored:
    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self._images[index]


@pytest.fixture(scope="module")
def known():
    """(pictures, images, particles without poses, true class)."""
    generator = torch.Generator().manual_seed(3)
    truth = pictures(K, BOX, generator)
    images, particles, klass = particles_of(truth, COUNT, PIXEL, 1.0, 1.0, generator)
    n = len(particles)
    blind = replace(particles, rotation=torch.eye(3, dtype=torch.float64).expand(n, 3, 3).contiguous(), shift=torch.zeros(n, 2).double())
    return truth, images, blind, klass, particles


def job_for(images: torch.Tensor, **options) -> ClassifyJob:
    small = {"classes": K, "diameter": DIAMETER, "offset_range": 3, "psi_step": 15.0, "iterations": 10, "max_significant": 60}
    settings = {**small, "scale": False, **options}
    params = resolved(Class2dParams(**settings), PIXEL)
    return ClassifyJob(Stored(images), params, make_engine(params, seed=options.get("seed", 0)), FORM)


def last(job: ClassifyJob, particles, references=None):
    *_, state = class2d(job, initial_state(job, particles, PIXEL, references))
    return state


def best_match(average: torch.Tensor, picture: torch.Tensor) -> float:
    """Highest correlation of a picture with an average over in-plane turns of 5° and shifts of up to 2 px."""
    import numpy as np
    from scipy.ndimage import rotate

    turned = np.stack([rotate(picture.numpy(), a, reshape=False, order=1) for a in range(0, 360, 5)])
    views = torch.stack([torch.roll(torch.from_numpy(turned), (y, x), (1, 2)) for y in range(-2, 3) for x in range(-2, 3)]).flatten(0, 1)
    a, b = (v - v.mean((-2, -1), keepdim=True) for v in (average[None], views))
    return float(((a * b).sum((-2, -1)) / (a.norm(dim=(-2, -1)) * b.norm(dim=(-2, -1)))).max())


@pytest.mark.parametrize(("method", "iterations"), [("em", 10), ("vdam", 30)])
def test_known_classes_are_found_from_nothing(known, method, iterations):
    """More classes than pictures, so that none needs to be shared: members are of one kind, and every picture is seen."""
    truth, images, blind, klass, _ = known
    state = last(job_for(images, method=method, iterations=iterations, classes=2 * K), blind)
    assert agreement(state.particles.klass - 1, klass) > 0.95
    counts = torch.bincount(state.particles.klass - 1, minlength=2 * K)
    averages = state.model.maps[torch.nonzero(counts > 20)[:, 0]]
    shown = lowpass_map(truth, PIXEL, 14.0, dims=2)
    for picture in shown:
        assert max(best_match(average, picture) for average in averages) > 0.9
    assert float(state.model.pdf_class.sum()) == pytest.approx(1, abs=1e-9)
    assert state.unmasked is not None and state.unmasked.shape == state.model.maps.shape
    full = state.model.coverage[counts > 20]  # of filled classes the low shells are complete, the last ones are not
    assert float(full[:, 1:4].min()) > 0.9 and float(full[:, -1].max()) < 0.5


def test_from_the_true_averages_poses_are_recovered(known):
    """EM from the pictures themselves: class, shift and in-plane angle come out within the sampling."""
    truth, images, blind, klass, particles = known
    state = last(job_for(images, iterations=5, center_classes=False, initial_lowpass=12.0), blind, references=truth)
    assert (state.particles.klass - 1 == klass).double().mean() > 0.97
    angle = torch.rad2deg(torch.acos(((state.particles.rotation * particles.rotation).sum((1, 2)) / 2 - 0.5).clamp(-1, 1)))
    assert angle.median() < 5
    assert (state.particles.shift - particles.shift).norm(dim=1).median() < 1.0 * PIXEL
    assert (state.model.pdf_class - 1 / K).abs().max() < 0.03
    noise = state.model.sigma2[0] * 2 * BOX**2  # white noise of variance 1 (spec 9.1.15), times the squared norm factor
    assert noise[5:-1].std() < 0.05 * noise[5:-1].mean()


def test_averages_are_centred(known):
    """References 3 px off the centre end in the middle, with centring; without it they stay."""
    truth, images, blind, _, _ = known
    off = torch.roll(truth, (3, -2), (1, 2))
    line = torch.arange(BOX) - BOX // 2

    def centre(maps):
        mass = (maps - 0.1 * maps.amax((1, 2), keepdim=True)).clamp(min=0)
        return torch.stack([(mass.sum(1) * line).sum(1), (mass.sum(2) * line).sum(1)], -1) / mass.sum((1, 2))[:, None]

    found = {}
    for wanted in (True, False):
        job = job_for(images, iterations=2, center_classes=wanted, initial_lowpass=12.0)
        found[wanted] = centre(last(job, blind, references=off).model.maps)
    assert found[True].norm(dim=1).max() < 1.0 < found[False].norm(dim=1).min()


@pytest.mark.parametrize("loose", [1.2, 1.4, 1.6])
@pytest.mark.parametrize("off", [0, 6])
def test_a_particle_beside_others_keeps_the_middle(loose, off):
    """A hollow sphere with one touching it and another farther off: centred again and again, it ends in the middle of the box.

    With the mass of the whole box the average comes to rest between the two (half their distance, 11 px, away).
    """
    box, radius = 96, 20
    line = torch.arange(box, dtype=torch.float64) - box // 2

    def shell(x):
        r2 = (line - x) ** 2 + line[:, None] ** 2
        return (radius**2 - r2).clamp(min=0).sqrt() - ((0.65 * radius) ** 2 - r2).clamp(min=0).sqrt()

    at = off
    for _ in range(12):
        field = shell(at) + shell(at + 2.1 * radius) + shell(at - 4.3 * radius)
        job = job_for(torch.zeros(1), diameter=2 * radius * PIXEL * loose)
        after = centred(job, field[None], PIXEL)
        shift = [x for x in range(-3, 4) if torch.equal(after[0][:, 10:-10], torch.roll(field, x, 1)[:, 10:-10])]
        assert len(shift) == 1
        at += shift[0]
    assert abs(at) <= (2 if loose < 1.5 else 3)


class Recorded(Stored):
    """Images that remember which of them were asked for."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(images)
        self.asked: list[int] = []

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self.asked += index.tolist()
        return super().__getitem__(index)


def test_while_a_run_explores_particles_meet_averages_of_the_others(known):
    """Halves take turns: what an iteration compares with is made of images it does not read. Then all take part, the last time too."""
    _, images, blind, _, _ = known
    pictures_read = Recorded(images)
    job = replace(job_for(images, iterations=5, classes=6, explore=1.0), images=pictures_read)
    state, read = initial_state(job, blind, PIXEL), []
    for _ in range(5):
        pictures_read.asked = []
        before, state = state, iterate(job, state)
        read.append(set(pictures_read.asked))
        idle = torch.tensor(sorted(set(range(COUNT)) - read[-1]), dtype=torch.int64)
        assert torch.equal(state.particles.rotation[idle], before.particles.rotation[idle])
        assert torch.equal(state.poses.klass[idle], before.poses.klass[idle])
    assert read[0] == read[2] and read[1] == read[3] and not read[0] & read[1]
    assert len(read[0]) == COUNT // 2 and len(read[0] | read[1]) == len(read[4]) == COUNT


def test_while_a_run_explores_a_large_class_has_no_advantage(known):
    """With nine tenths of the prior and of the particles in one of two equal averages, the next iteration shares them out evenly."""
    truth, images, blind, _, _ = known
    share = {}
    for explore in (0.9, 0.0):
        job = job_for(images, iterations=4, classes=2, explore=explore, inactivity_threshold=0.0)
        state = initial_state(job, blind, PIXEL, truth[:1].expand(2, BOX, BOX))
        pdf = torch.tensor([0.9, 0.1], dtype=torch.float64)
        model = replace(state.model, pdf_class=pdf, pdf_direction=pdf[:, None].expand_as(state.model.pdf_direction))
        share[explore] = float(iterate(job, replace(state, model=model)).model.pdf_class[0])
    assert share[0.9] == pytest.approx(0.5, abs=1e-3) and share[0.0] > 0.89


def test_exploring_separates_views_that_share_classes_without_it():
    """Eight pictures in sixteen classes, a quarter of the images pure noise: without it large classes hold two pictures, others nothing."""
    generator = torch.Generator().manual_seed(9)
    truth = pictures(8, BOX, generator)
    images, particles, klass = particles_of(truth, 400, PIXEL, 1.0, 1.0, generator)
    images[300:], klass[300:] = torch.randn(100, BOX, BOX, generator=generator), 8
    n = len(particles)
    blind = replace(particles, rotation=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), shift=torch.zeros(n, 2, dtype=torch.float64))
    right, small = {}, {}
    for explore in (0.6, 0.0):
        found = last(job_for(images, classes=16, iterations=15, explore=explore), blind).particles.klass - 1
        right[explore] = agreement(found, klass)
        small[explore] = int((torch.bincount(found, minlength=16) < 0.2 * n / 16).sum())
    assert right[0.6] > 0.92 > right[0.0] + 0.05
    assert small[0.6] < small[0.0]


@pytest.mark.parametrize("method", ["em", "vdam"])
def test_a_run_in_pieces_is_the_same(known, method):
    """2 + 2 iterations = 4: all that an iteration needs is in the state. The same seed gives the same bits."""
    _, images, blind, _, _ = known
    job = job_for(images, method=method, iterations=4)
    states = list(class2d(job, initial_state(job, blind, PIXEL)))
    assert [s.progress.iteration for s in states] == [1, 2, 3, 4]
    *_, again = class2d(job, states[1])
    assert torch.equal(again.model.maps, states[-1].model.maps) and torch.equal(again.particles.klass, states[-1].particles.klass)
    assert isinstance(states[0], GradientState) == (method == "vdam")


def test_gradient_runs_touch_their_mini_batch_only(known):
    """An iteration of 200 of 300 particles leaves the others as they were; the last takes all."""
    _, images, blind, _, _ = known
    job = job_for(images, method="vdam", iterations=3)
    start = initial_state(job, blind, PIXEL)
    one = next(class2d(job, start))
    assert int((one.poses.pmax > 0).sum()) == 200
    untouched = one.poses.pmax == 0
    assert torch.equal(one.particles.rotation[untouched], start.particles.rotation[untouched])
    assert int((last(job, blind).poses.pmax > 0).sum()) == COUNT
    assert torch.equal(start.poses.pmax, torch.zeros(COUNT).double())  # nothing was written into the state before


def test_poses_of_a_3d_refinement_keep_their_in_plane_angle(known, rng):
    """skip_align with tilted orientations: references are turned by psi, not squeezed by the tilt."""
    truth, images, _, klass, particles = known
    tilted = replace(particles, rotation=particles.rotation @ random_rotations(1, rng).expand(COUNT, 3, 3))
    job = job_for(images, skip_align=True, iterations=1, initial_lowpass=12.0)
    state = initial_state(job, tilted, PIXEL, truth)
    assert torch.allclose(state.particles.rotation[:, 2, 2], torch.ones(COUNT).double())
    exact = iterate(job, initial_state(job, particles, PIXEL, truth))
    assert torch.allclose(exact.particles.rotation, particles.rotation, atol=1e-9)
    assert (exact.particles.klass - 1 == klass).double().mean() > 0.97


def test_defaults_follow_the_method():
    em, vdam = (resolved(Class2dParams(method=m), 2.0) for m in ("em", "vdam"))
    assert (em.iterations, em.max_significant) == (25, 1000) and (vdam.iterations, vdam.max_significant) == (200, 250)
    assert em.initial_lowpass == pytest.approx(2.0 / 0.07)
    kept = resolved(Class2dParams(method="vdam", iterations=30, max_significant=-1, initial_lowpass=50), 2.0)
    assert (kept.iterations, kept.max_significant, kept.initial_lowpass) == (30, -1, 50)
    assert Class2dParams(psi_step=10).sampling(1.0).coarse_step == 10
