"""The loop of classification on small simulated sets: seeds, empty classes, options that keep or limit what is searched."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import frazil.steps.classify as step
from frazil.data import Optics
from frazil.maths.rotation import rotation_angle
from frazil.maths.symmetry import operators
from frazil.refine.convergence import Progress
from frazil.refine.sampling import Sampling
from frazil.simulate.classes import ClassSet, simulate_classes
from frazil.simulate.particles import Settings
from frazil.steps.class3d import FORM, Class3dParams, coarser_sampling, scheduled_order
from frazil.steps.classify import ClassifyJob, ClassifyState, classify, initial_state, iterate, make_engine, reseeded

BOX, PIXEL, COUNT = 24, 6.0, 60
PARAMS = Class3dParams(
    classes=2, initial_lowpass=30, diameter=110, offset_range=2, offset_step=1, healpix_order=1, perturb=0, iterations=3, tau_fudge=2
)


@pytest.fixture(scope="module")
def made() -> ClassSet:
    """Particles of two structures."""
    return simulate_classes(COUNT, Optics(PIXEL, BOX), 2, Settings(snr=1.0, shift_sd=3.0, seed=2))


def job_of(made: ClassSet, params: Class3dParams = PARAMS, **engine) -> ClassifyJob:
    return ClassifyJob(made.images, params, make_engine(params, seed=1, **engine), FORM)


def start(made: ClassSet, job: ClassifyJob, references: int = 1, known: bool = False) -> ClassifyState:
    """Iteration 0; known: from the true poses."""
    maps = torch.stack([v.data for v in made.maps[:references]])
    particles = made.particles
    if not known:
        eye = torch.eye(3, dtype=torch.float64).repeat(COUNT, 1, 1)
        particles = replace(particles, rotation=eye, shift=torch.zeros(COUNT, 2, dtype=torch.float64))
    return initial_state(job, replace(particles, klass=torch.zeros_like(particles.klass)), maps, PIXEL)


class TestSeeds:
    def test_cross_correlation_makes_one_map_which_is_copied(self, made):
        job = job_of(made)
        first = start(made, job)
        assert torch.bincount(first.assigned).min() > COUNT // 4
        state = iterate(job, first)
        assert torch.equal(state.model.maps[0], state.model.maps[1]) and state.model.maps[0].abs().max() > 0
        assert state.model.pdf_class.tolist() == [0.5, 0.5] and (state.poses.klass == 0).all()
        assert state.progress.shell == first.progress.shell  # R stays that of the low-pass
        assert torch.equal(state.assigned, first.assigned)

    def test_then_each_particle_takes_the_class_drawn_for_it(self, made):
        job = job_of(made)
        first = iterate(job, start(made, job))
        second = iterate(job, first)
        assert torch.equal(second.poses.klass, first.assigned) and second.assigned is None
        assert not torch.equal(second.model.maps[0], second.model.maps[1])
        share = torch.bincount(first.assigned).double() / COUNT
        assert (second.model.pdf_class - share).abs().max() < 0.01
        third = iterate(job, second)
        assert 0 < (third.poses.klass != second.poses.klass).double().mean() < 1

    def test_without_it_the_first_iteration_takes_them(self, made):
        job = job_of(made, PARAMS.model_copy(update={"firstiter_cc": False}))
        first = start(made, job)
        assert torch.equal(iterate(job, first).poses.klass, first.assigned)

    def test_references_of_their_own_need_no_seeds(self, made):
        """From the two true maps the particles find their class at once."""
        job = job_of(made, PARAMS.model_copy(update={"firstiter_cc": False}))
        first = start(made, job, references=2)
        assert first.assigned is None
        state = iterate(job, first)
        assert (state.poses.klass + 1 == made.particles.klass).double().mean() > 0.7


class TestEmptyClasses:
    @pytest.fixture(scope="class")
    def state(self, made) -> ClassifyState:
        """Three classes of which the last is a map of noise: nothing goes there."""
        params = PARAMS.model_copy(update={"classes": 3, "firstiter_cc": False})
        job = job_of(made, params)
        two = start(made, job, references=2)  # two references for three classes: the first for all, seeded
        maps = torch.stack([v.data for v in made.maps] + [1000 * torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0))])
        first = initial_state(job, two.particles, maps, PIXEL)
        return iterate(job, first)

    def test_its_map_and_share_are_zero_and_it_is_named(self, state):
        assert state.emptied == (2,)
        assert state.model.pdf_class[2] == 0 and state.model.maps[2].abs().max() == 0 and state.model.data_vs_prior[2].abs().max() == 0
        assert float(state.model.pdf_class.sum()) == pytest.approx(1)

    def test_the_run_goes_on_without_it(self, made, state):
        job = job_of(made, PARAMS.model_copy(update={"classes": 3, "firstiter_cc": False}))
        after = iterate(job, state)
        assert after.emptied == () and after.model.classes == 3 and after.model.pdf_class[2] == 0
        assert torch.isfinite(after.model.maps).all() and (after.poses.klass < 2).all()
        assert step.at_live_classes(torch.tensor([-1, 0, 1, 2]), torch.tensor([1]), 3).tolist() == [-1, -1, 0, -1]

    def test_a_particle_without_any_finite_likelihood_keeps_its_class(self, made, state):
        """Its image is not a number: it has no weight, and its class is not taken for a number among those that live."""
        images = made.images.clone()
        images[5] = torch.nan
        lower = replace(state, model=step.spread(step.classes_of(state.model, torch.tensor([0, 1])), torch.tensor([0, 2]), 3))
        klass = torch.where(state.particles.klass == 2, 3, 1)
        klass[5] = 3
        lower = replace(lower, particles=replace(state.particles, klass=klass), poses=replace(state.poses, klass=klass - 1))
        params = PARAMS.model_copy(update={"classes": 3, "firstiter_cc": False})
        after = iterate(replace(job_of(made, params), images=images), lower)
        assert int(after.poses.klass[5]) == 2 and (after.poses.klass != 1).all() and torch.isfinite(after.model.maps).all()

    def test_it_is_as_if_there_had_never_been_a_third(self, made, state):
        job = job_of(made, PARAMS.model_copy(update={"classes": 3, "firstiter_cc": False}))
        after = iterate(job, state)
        two = PARAMS.model_copy(update={"firstiter_cc": False})
        alone = replace(state, model=step.classes_of(state.model, torch.tensor([0, 1])), accuracy=state.accuracy[:2])
        assert torch.equal(iterate(job_of(made, two), alone).model.maps, after.model.maps[:2])

    def test_it_may_start_anew_from_half_of_the_largest(self, made, state):
        params = PARAMS.model_copy(update={"classes": 3, "reseed_below": 0.1, "iterations": 5, "firstiter_cc": False})
        job = job_of(made, params)
        donor = int(state.model.pdf_class.argmax())
        fresh = reseeded(job, state, torch.ones(3), torch.Generator().manual_seed(1))
        assert fresh.emptied == (2,) and torch.equal(fresh.model.maps[2], fresh.model.maps[donor])
        assert float(fresh.model.pdf_class.sum()) == pytest.approx(1)
        assert float(fresh.model.pdf_class[2]) == pytest.approx(float(state.model.pdf_class[donor]) / 2)
        assert float(fresh.model.pdf_direction.sum()) == pytest.approx(1)
        mine = state.poses.klass == donor
        assert set(fresh.assigned[mine].tolist()) == {donor, 2} and (fresh.assigned[~mine] == -1).all()
        after = iterate(job, fresh)
        assert torch.equal(after.poses.klass[mine], fresh.assigned[mine])
        assert not torch.equal(after.model.maps[2], after.model.maps[donor]) and after.model.maps[2].abs().max() > 0

    def test_not_after_the_last_iteration(self, made, state):
        params = PARAMS.model_copy(update={"classes": 3, "reseed_below": 0.1, "iterations": state.progress.iteration})
        assert reseeded(job_of(made, params), state, torch.ones(3), torch.Generator()).assigned is None


class TestWhatIsKept:
    def test_skip_align_keeps_poses_and_finds_classes(self, made):
        params = PARAMS.model_copy(update={"skip_align": True, "firstiter_cc": False, "perturb": 0.5})
        job = job_of(made, params)
        state = iterate(job, start(made, job, references=2, known=True))
        assert (state.particles.rotation - made.particles.rotation).abs().max() < 1e-9
        assert (state.particles.shift - made.particles.shift).abs().max() < 1e-9  # with its fraction of a pixel
        assert state.model.pdf_direction.shape == (2, 1) and state.progress.coarse_size == state.progress.size
        assert (state.poses.klass + 1 == made.particles.klass).double().mean() > 0.85
        assert (state.poses.significant <= 2).all()

    def test_skip_rotate_keeps_orientations_only(self, made):
        params = PARAMS.model_copy(update={"skip_rotate": True, "firstiter_cc": False})
        job = job_of(made, params)
        known = start(made, job, references=2, known=True)
        away = replace(known, particles=replace(known.particles, shift=torch.zeros(COUNT, 2, dtype=torch.float64)))
        state = iterate(job, away)
        assert (state.particles.rotation - made.particles.rotation).abs().max() < 1e-9
        error = (state.particles.shift - made.particles.shift).norm(dim=-1)
        assert error.median() < 0.5 * made.particles.shift.norm(dim=-1).median()

    def test_sigma_ang_searches_near_the_old_orientations(self, made):
        params = PARAMS.model_copy(update={"sigma_ang": 8.0, "healpix_order": 2, "firstiter_cc": False})
        job = job_of(made, params)
        state = iterate(job, start(made, job, references=2, known=True))
        turned = rotation_angle(state.particles.rotation, made.particles.rotation, operators("C1"))
        assert turned.max() < 3 * 8 * 3**0.5 + 15  # 3σ in direction and in plane, and to the next grid point
        assert turned.median() < 20
        centre = state.particles.rotation
        again = iterate(job, state)
        assert rotation_angle(again.particles.rotation, centre, operators("C1")).max() < 3 * 8 * 3**0.5 + 15

    def test_strict_highres_hides_finer_detail_from_the_comparison_but_not_from_the_sums(self, made):
        """White noise beyond the limit changes no pose and no class."""
        limit, rng = 36.0, torch.Generator().manual_seed(5)
        noisy = torch.fft.rfft2(made.images)
        k = torch.hypot(torch.fft.fftfreq(BOX, 1 / BOX)[:, None], torch.arange(BOX // 2 + 1.0)[None])
        noisy = torch.where(k > BOX * PIXEL / limit + 2.5, noisy + 30 * torch.randn(noisy.shape, generator=rng), noisy)
        other = replace(made, images=torch.fft.irfft2(noisy, s=(BOX, BOX)))
        whole = {"diameter": 300.0, "norm": False, "flatten_solvent": False}  # a mask would mix frequencies
        params = PARAMS.model_copy(update={"strict_highres": limit, "firstiter_cc": False, **whole})
        results = []
        for some in (made, other):
            job = job_of(some, params)
            first = start(made, job, references=2)
            first = replace(first, model=replace(first.model, sigma2=(torch.full((BOX // 2 + 1,), 0.5 / BOX**2, dtype=torch.float64),)))
            results.append(iterate(job, first))
        a, b = results
        assert a.progress.coarse_size == 2 * round(BOX * PIXEL / limit) < a.progress.size
        assert torch.equal(a.poses.klass, b.poses.klass) and (a.poses.rotation - b.poses.rotation).abs().max() < 1e-6
        noise = [state.model.sigma2[0][8:11].mean() for state in results]
        assert noise[1] > 1.5 * noise[0]  # it was measured, within the window
        other = [iterate(job_of(some, PARAMS.model_copy(update={"firstiter_cc": False, **whole})), first) for some in (made, other)]
        assert (other[0].poses.log_likelihood - other[1].poses.log_likelihood).abs().max() > 1 and not torch.equal(
            other[0].poses.pmax, other[1].poses.pmax
        )  # without the limit it matters

    def test_a_coarser_grid_while_its_steps_are_finer_than_the_accuracy(self):
        first = Sampling(order=3, offset_range=20.0, offset_step=4.0)  # fine steps 3.75 degrees and 2 Å
        same = coarser_sampling(first, 4.0, 2.0)
        assert (same.order, same.offset_step) == (3, 4.0)
        # 0.8 · 10 degrees: steps of 3.75 and 7.5 are finer, of 15 not; one back from there.
        assert coarser_sampling(first, 10.0, 2.0).order == 2
        assert coarser_sampling(first, 20.0, 2.0).order == 1
        assert coarser_sampling(first, 999.0, 999.0) == first
        assert coarser_sampling(first, 4.0, 5.0).offset_step == pytest.approx(0.8 * 5 * 2)
        assert coarser_sampling(first, 4.0, 100.0).offset_step == pytest.approx(0.95 * 20)


class TestMemory:
    def test_a_device_that_runs_out_in_the_middle_is_given_smaller_batches(self, made, monkeypatch):
        """The E-step begins again with half the batch, and comes to the same result."""
        job = job_of(made, PARAMS.model_copy(update={"firstiter_cc": False}))
        first = start(made, job, references=2)
        wanted = iterate(job, first)
        true, shrinks = step.expectation, []

        def short(images, particles, model, grid, engine, sizes, **more):
            shrinks.append(engine.shrink)
            seen = []

            def tick(done: int) -> None:
                seen.append(done)
                if engine.shrink < 4:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            return true(images, particles, model, grid, engine, sizes, **{**more, "tick": tick})

        monkeypatch.setattr(step, "expectation", short)
        found = iterate(job, first)
        assert shrinks == [1, 2, 4]
        iterate(job, found)
        assert shrinks == [1, 2, 4, 4]  # it is remembered
        assert torch.equal(found.poses.klass, wanted.poses.klass)
        assert (found.model.maps - wanted.model.maps).norm() < 1e-4 * wanted.model.maps.norm()


    @pytest.mark.parametrize("where", ["reference_volumes", "maximize"])
    def test_outside_the_batches_maps_and_m_step_go_to_main_memory(self, made, monkeypatch, caplog, where):
        """The iteration begins again, once; a device on which nothing fits is an error."""
        job = job_of(made, PARAMS.model_copy(update={"firstiter_cc": False}))
        first = start(made, job, references=2)
        wanted, true, failures = iterate(job, first), getattr(step, where), [1]

        def short(*args, **more):
            if failures and failures.pop():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return true(*args, **more)

        monkeypatch.setattr(step, where, short)
        found = iterate(job, first)
        assert found.maps_in_main and "in main memory from now on" in caplog.text and found.model.maps.device.type == "cpu"
        assert torch.equal(found.model.maps, wanted.model.maps) and torch.equal(found.poses.klass, wanted.poses.klass)
        failures.extend([1, 1])
        with pytest.raises(torch.OutOfMemoryError):
            iterate(job, first)


def test_the_same_seed_gives_the_same_result(made):
    results = []
    for _ in range(2):
        job = job_of(made, PARAMS.model_copy(update={"perturb": 0.5}))
        *_, state = classify(job, start(made, job))
        results.append(state)
    assert torch.equal(results[0].model.maps, results[1].model.maps) and torch.equal(results[0].poses.klass, results[1].poses.klass)
    assert results[0].progress == results[1].progress


def test_auto_sampling_goes_finer_while_steps_are_coarser_than_the_accuracy():
    params = Class3dParams(healpix_order=2, offset_range=5, offset_step=2, iterations=25)
    last, orders = params.sampling(2.0), []
    for iteration in range(1, 26):
        known = Progress(iteration, 20, accuracy_rotation=1.0, accuracy_shift=1.0, change_shift=1.0)
        last = params.next_sampling(known, last, 128, 2.0)
        orders.append(last.order)
        assert (last.sigma is None) == (last.order == 2)
    assert orders == [2] * 6 + [4] * 8 + [5] * 11
    assert last.sigma == pytest.approx(2 * last.step) and last.offset_step < 4.0
    # 3.75 degrees (1.9 oversampled) suffice for an accuracy of 2; nothing is finer where it is not known, or not wished.
    four, two = replace(params.sampling(2.0), order=4, sigma=3.75), params.sampling(2.0)
    late = replace(known, iteration=20, accuracy_rotation=2.0)
    assert params.next_sampling(late, four, 128, 2.0) == four
    assert params.next_sampling(late, two, 128, 2.0).order == 5  # straight there, as when it was continued late
    assert params.next_sampling(replace(late, accuracy_rotation=999.0), two, 128, 2.0) == two
    for given in ({"auto_sampling": False}, {"skip_align": True}, {"sigma_ang": 5.0}):
        other = params.model_copy(update=given)
        assert other.next_sampling(late, other.sampling(2.0), 128, 2.0) == other.sampling(2.0)


def test_few_iterations_keep_the_first_grid():
    assert [scheduled_order(i, 6, 2) for i in range(1, 7)] == [2] * 6
    assert [scheduled_order(i, 60, 4) for i in (15, 16, 35, 36)] == [4, 5, 5, 6]
