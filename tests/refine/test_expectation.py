"""The E-step against the formulas of spec/refinement 2.1, 3.1 and 3.8, written out for a handful of particles and every hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from frazil.data import Optics, Particles
from frazil.maths.filters import lowpass_map
from frazil.maths.rotation import random_rotations
from frazil.ops.project import project
from frazil.refine.expectation import expectation
from frazil.refine.model import Model
from frazil.refine.residence import Resident, share
from frazil.refine.sampling import Sampling, make_grid
from frazil.refine.search import reference_volumes
from frazil.refine.windows import Engine, make_frame, make_windows

BOX, PIXEL, N = 16, 4.0, 6
OPTICS = Optics(PIXEL, BOX)


class Stored:
    def __init__(self, images: torch.Tensor) -> None:
        self._images = images

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self._images[index]


def problem(rng: torch.Generator) -> tuple[Stored, Particles, Model]:
    """Six noisy images of nothing in particular, two micrographs, and a random smooth reference."""
    f = torch.float64
    images = torch.randn(N, BOX, BOX, generator=rng, dtype=f)
    particles = Particles(
        optics=(OPTICS,), group=torch.zeros(N, dtype=torch.int64), rotation=random_rotations(N, rng),
        shift=4 * torch.randn(N, 2, generator=rng, dtype=f),
        defocus=torch.tensor([[12000.0, 11000.0, 30.0]], dtype=f).repeat(N, 1), half=torch.ones(N, dtype=torch.int64),
        micrograph=torch.arange(N) % 2, micrographs=("a", "b"),
    )  # fmt: skip
    density = lowpass_map(torch.randn(BOX, BOX, BOX, generator=rng, dtype=f), PIXEL, 16) * 0.5
    shells = torch.zeros(1, BOX // 2 + 1, dtype=f)
    model = Model(
        maps=density[None], pixel_size=PIXEL, sigma2=(torch.linspace(1.5, 0.8, BOX // 2 + 1, dtype=f) / (2 * BOX**2),),
        scales=torch.tensor([0.9, 1.1], dtype=f), norm_average=1.0, sigma_offset=8.0, pdf_class=torch.ones(1, dtype=f),
        pdf_direction=torch.rand(1, 48, generator=rng, dtype=f), tau2=shells, data_vs_prior=shells + 5,
        fsc=shells[0], sigma2_map=shells, coverage=shells,
    )  # fmt: skip
    return Stored(images), particles, replace(model, pdf_direction=model.pdf_direction / model.pdf_direction.sum())


def test_every_hypothesis_by_the_formula(rng: torch.Generator) -> None:
    images, particles, model = problem(rng)
    engine = Engine(diameter=44, mask_edge=2, fraction=1.0, dtype=torch.float64)
    grid = make_grid(Sampling(order=1, offset_range=8, offset_step=4, oversampling=0, factor=0.5, instance=0.3))
    size = 12
    statistics, poses, _ = expectation(images, particles, model, grid, engine, (size, size))

    frame = make_frame(OPTICS, size, BOX, PIXEL, engine)
    w = make_windows(images[torch.arange(N)], particles, torch.arange(N), frame, model, engine, 0)
    rotations = grid.coarse_rotations(torch.arange(grid.orientations))
    slices = project(reference_volumes(model, size, engine)[0], rotations, frame.coords, 2.0, implementation="reference")
    shell = frame.pixels.shell[: frame.inside]
    sigma2 = model.sigma2[0][shell]
    shifts = grid.coarse_shifts()
    phases = torch.polar(torch.ones(frame.inside, len(shifts), dtype=torch.float64), -2 * math.pi * frame.k @ shifts.T)
    log_direction = model.pdf_direction[0].log().repeat_interleave(grid.n_psi)
    noise = torch.zeros(size // 2 + 1, dtype=torch.float64)
    direction = torch.zeros(48, dtype=torch.float64)
    for i in range(N):
        moved = w.masked[i][:, None] * phases  # (p, t)
        residual = (w.gain[i] * slices)[:, :, None] - moved  # (o, p, t)
        d = 0.5 * (residual.abs().square() / sigma2[:, None])[:, 1:].sum(1)
        prior = -(w.pre_shift[i] + grid.shifts).square().sum(-1) / (2 * model.sigma_offset**2)
        log = log_direction[:, None] + prior - d
        gamma = torch.softmax(log.reshape(-1), 0).reshape(log.shape)
        best = int(gamma.argmax())
        assert poses.pmax[i] == pytest.approx(float(gamma.max()), rel=1e-8)
        assert torch.allclose(poses.rotation[i], rotations[best // len(shifts)])
        assert torch.allclose(poses.shift[i], w.pre_shift[i] + shifts[best % len(shifts)])
        power = torch.einsum("ot,opt->p", gamma, residual.abs().square())
        noise.index_add_(0, shell, power)
        noise[size // 2] += w.power[i, size // 2] - w.masked[i].abs().square()[shell == size // 2].sum()
        direction += gamma.sum(1).reshape(48, grid.n_psi).sum(1)
        expected = (
            power.sum() + w.power[i, size // 2] - w.masked[i].abs().square()[shell == size // 2].sum() + w.power[i, size // 2 + 1 :].sum()
        )
        assert poses.norm[i] == pytest.approx(math.sqrt(2 * float(expected)), rel=1e-8)
    assert torch.allclose(statistics.sigma2[0][: size // 2 + 1], noise, rtol=1e-8)
    assert torch.allclose(statistics.sigma2[0][size // 2 + 1 :], w.power[:, size // 2 + 1 :].sum(0))
    assert torch.allclose(statistics.direction[0], direction, rtol=1e-8)
    assert float(statistics.sigma2_weight[0]) == pytest.approx(N, rel=1e-10)


def test_batches_do_not_show(rng: torch.Generator) -> None:
    images, particles, model = problem(rng)
    grid = make_grid(Sampling(order=1, offset_range=8, offset_step=4, instance=0.1))
    whole = expectation(images, particles, model, grid, Engine(diameter=44, dtype=torch.float64), (12, 8))
    parts = expectation(images, particles, model, grid, Engine(diameter=44, dtype=torch.float64, budget=1 << 20, shrink=1 << 20), (12, 8))
    # In chunks nothing is left out of the list; else 5e-5 of the mass is, known to a tenth: a sample of that weight may differ.
    assert torch.allclose(whole[1].rotation, parts[1].rotation) and torch.allclose(whole[1].norm, parts[1].norm, rtol=1e-5)
    assert torch.allclose(whole[0].data, parts[0].data, rtol=1e-4, atol=1e-4 * float(whole[0].data.abs().max()))
    assert torch.allclose(whole[0].sigma2[0], parts[0].sigma2[0], rtol=1e-5)


def test_images_on_the_device_give_the_same(rng: torch.Generator) -> None:
    """Resident images are asked by group and device index, other images by index in main memory; shares of them too."""
    images, particles, model = problem(rng)
    grid, engine = make_grid(Sampling(order=1, offset_range=8, offset_step=4)), Engine(diameter=44, dtype=torch.float64, shrink=1 << 20)
    two = replace(particles, optics=(OPTICS, replace(OPTICS, name="b")), group=torch.tensor([0, 1, 1, 0, 1, 0]))
    pixels = images[torch.arange(N)]
    held = Resident((pixels[two.group == 0], pixels[two.group == 1]), two.group, torch.tensor([0, 0, 1, 1, 2, 2]))
    model = replace(model, sigma2=model.sigma2 * 2)
    for some in (torch.arange(N), torch.tensor([1, 3, 4])):
        plain = expectation(Stored(pixels[some]), two[some], model, grid, engine, (12, 8))
        there = expectation(share(held, some), two[some], model, grid, engine, (12, 8))
        assert torch.equal(plain[0].data, there[0].data)
        assert all(torch.equal(a, b) for a, b in zip(vars(plain[1]).values(), vars(there[1]).values(), strict=True))


def test_the_cross_correlation_mode_takes_one_sample(rng: torch.Generator) -> None:
    images, particles, model = problem(rng)
    grid = make_grid(Sampling(order=1, offset_range=8, offset_step=4))
    statistics, poses, _ = expectation(images, particles, model, grid, Engine(diameter=44, dtype=torch.float64, cc=True), (12, 8))
    assert torch.equal(poses.pmax, torch.ones(N, dtype=torch.float64)) and float(statistics.direction.sum()) == pytest.approx(N)


def test_a_tick_that_raises_stops_the_step(rng: torch.Generator) -> None:
    images, particles, model = problem(rng)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        expectation(
            images, particles, model, make_grid(Sampling(order=1, offset_range=4, offset_step=4)), Engine(diameter=44), (12, 8), tick=stop
        )


def test_an_image_that_is_not_a_number_keeps_its_pose_and_counts_for_nothing(rng: torch.Generator, caplog) -> None:
    """Spec 2.7: such a particle is counted and named; the sums are those of the others."""
    images, particles, model = problem(rng)
    engine = Engine(diameter=44, mask_edge=2, dtype=torch.float64)
    grid = make_grid(Sampling(order=1, offset_range=8, offset_step=4, factor=0.0))
    spoilt = images[torch.arange(N)].clone()
    spoilt[2] = torch.nan
    others = torch.tensor([0, 1, 3, 4, 5])
    found, poses, _ = expectation(Stored(spoilt), particles, model, grid, engine, (12, 8))
    clean, _, _ = expectation(Stored(spoilt[others]), particles[others], model, grid, engine, (12, 8))
    assert "1 particles have no orientation" in caplog.text
    torch.testing.assert_close(poses.rotation[2], particles.rotation[2])
    torch.testing.assert_close(found.sigma2[0], clean.sigma2[0])
    torch.testing.assert_close(found.data, clean.data)
    assert poses.pmax[2] == 0 and poses.significant[2] == 0
    near = make_grid(Sampling(order=1, offset_range=8, offset_step=4, factor=0.0, sigma=10.0))
    for cc in (False, True):
        for where in (grid, near):  # a batch of nothing else
            alone, poses, _ = expectation(Stored(spoilt[2:3]), particles[2:3], model, where, replace(engine, cc=cc), (12, 8))
            assert float(alone.weight.abs().max()) == 0 and float(alone.sigma2_weight.sum()) == 0 and poses.pmax.tolist() == [0.0]
            torch.testing.assert_close(poses.rotation, particles.rotation[2:3])
