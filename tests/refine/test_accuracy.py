"""Expected accuracies of 2D classes: all at once as one by one, only psi turns, and the formula for a class that is one frequency."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from frazil.refine.accuracy import LIMIT, expected_accuracies, expected_accuracy
from frazil.refine.windows import Engine
from frazil.simulate.averages import particles_of, pictures
from frazil.steps.class2d import neutral_model

BOX, PIXEL = 32, 3.0
ENGINE = Engine(diameter=-1.0, dtype=torch.float64)


@pytest.fixture
def model_and_particles(rng):
    averages = pictures(4, BOX, rng).double() * torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)[:, None, None]
    _, particles, _ = particles_of(averages.float(), 12, PIXEL, 1.0, 1.0, rng)
    return neutral_model(averages, PIXEL, particles), particles


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_classes_together_are_classes_alone(model_and_particles):
    model, particles = model_and_particles
    together = expected_accuracies(particles, model, torch.tensor([2, 0, 3]), ENGINE, 24, seeded())
    for row, k in zip(together.tolist(), (2, 0, 3), strict=True):
        assert row == pytest.approx(expected_accuracy(particles, model, k, ENGINE, 24, seeded()), rel=1e-12)


def test_stronger_classes_are_known_better(model_and_particles):
    """Twice the signal: half the error, both ways (squared distances grow with the square, and distances with the error, while small)."""
    model, particles = model_and_particles
    double = replace(model, maps=2 * model.maps)
    all_of = torch.arange(4)
    one, two = (expected_accuracies(particles, m, all_of, ENGINE, 24, seeded()) for m in (model, double))
    assert torch.allclose(two[1] / one[1], torch.tensor([0.5, 0.5], dtype=torch.float64), atol=0.12)


def test_shift_error_of_a_single_wave(rng, model_and_particles):
    """V = a wave along x of k cycles a box: |F1 − F2|² = |c V|²·(2 − 2 cos 2πkε/N), so ε follows in closed form for shifts along x."""
    _, particles = model_and_particles
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    wave = 0.5 * torch.cos(2 * math.pi * 3 * line / BOX)[None].expand(BOX, BOX)
    model = neutral_model(wave[None], PIXEL, particles)
    one = replace(particles[:1], rotation=torch.eye(3, dtype=torch.float64)[None])
    from frazil.refine.search import reference_volumes
    from frazil.refine.windows import make_frame, particle_ctf

    frame = make_frame(one.optics[0], 24, BOX, PIXEL, ENGINE)
    plane = reference_volumes(model, 24, ENGINE)[0]
    from frazil.ops.project import project

    cv = project(plane, one.rotation, frame.coords, 2.0)[0].abs() * particle_ctf(one, torch.tensor([0]), frame.k, one.optics[0], ENGINE)[0]
    inverse = 0.5 / model.sigma2[0][frame.pixels.shell[: frame.inside]]
    for axis in range(2):  # of the two that are drawn, each in closed form by bisection
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            torch.randint(3, (1,), generator=generator)
            if int(torch.randint(2, (1,), generator=generator)) == axis:
                break
        found = expected_accuracies(one, model, torch.tensor([0]), ENGINE, 24, torch.Generator().manual_seed(seed))[0, 1]
        low, high = 0.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            phase = 2 * math.pi * frame.k[:, axis] * PIXEL * middle
            total = float((cv.square() * inverse * (2 - 2 * torch.cos(phase)))[1:].sum())
            low, high = (middle, high) if total < LIMIT else (low, middle)
        assert float(found) == pytest.approx(min(low, 10.0) * PIXEL, rel=0.03)
