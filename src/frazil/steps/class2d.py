"""2D classification: K class averages of particles, with no reference at all (spec/refinement 2.3, 4.3, 5).

`class2d` yields a frozen state an iteration. By expectation and maximisation over all particles (the loop of steps/classify.py), or by
gradient steps on growing mini-batches (refine/gradient.py), which find their way from nothing sooner in large sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import resolution_shell
from frazil.maths.fourier2d import hermitian_planes, images_from_planes
from frazil.maths.masks import soft_circle
from frazil.maths.rotation import euler_to_matrix, matrix_to_euler
from frazil.ops.insert import insert_
from frazil.refine import gradient, planes
from frazil.refine.classes import Reconstruction, class_shells
from frazil.refine.convergence import after_classification, window_size
from frazil.refine.maximization import update_parameters
from frazil.refine.model import Model, Statistics
from frazil.refine.sampling import Sampling
from frazil.refine.search import reference_volumes
from frazil.refine.settings import setting
from frazil.refine.timing import Clock, added
from frazil.refine.windows import make_frame, make_windows
from frazil.steps import classify
from frazil.steps.classify import ClassifyJob, ClassifyParams, ClassifyState, Form

FIRST_PARTICLES = 1000  # as many make the first averages, or 5 a class
FIRST_FREQUENCY = 0.07  # cycles per pixel: the first averages hold no more
ITERATIONS = {"em": 25, "vdam": 200}
MOST_SIGNIFICANT = 1000  # only the flat posteriors of the first iterations have more
# In gradient runs centring ignores less than this share of the diameter, or px: the moments stay aligned with the average.
UNMOVED = (0.01, 2.0)


P = TypeVar("P", bound="Class2dParams")


class Class2dParams(ClassifyParams):
    """Class averages of particles, without a reference."""

    classes: int = setting(50, "number of classes", level="basic", ge=1)
    tau_fudge: float = setting(2.0, "factor on the signal prior: larger trusts the data more and finer detail sooner", level="basic", gt=0)
    method: Literal["em", "vdam"] = setting(
        "em", "em: all particles every iteration; vdam: gradient steps on mini-batches, for large sets", level="basic"
    )
    iterations: int = setting(0, "iterations; 0: 25 with em, 200 with vdam", level="basic", ge=0)
    initial_lowpass: float = setting(-1.0, "low-pass filter of the first averages; -1: 0.07 cycles per pixel", "Å")
    firstiter_cc: bool = setting(False, "first iteration by cross-correlation")
    max_significant: int = setting(
        0, "most coarse samples a particle may take to the fine pass; 0: 1000 with em, 5 a class with vdam; -1: no limit", ge=-1
    )
    psi_step: float = setting(12.0, "coarse step of the in-plane angle (half with one oversampling)", "degrees", "basic", ge=0.1, le=90)
    center_classes: bool = setting(True, "move every average's centre of mass to the centre of the box", level="basic")
    explore: float = setting(
        0.6, "em: part of the iterations in which the classes are held from taking one another's particles; 0: never, as RELION", ge=0, le=1
    )
    inactivity_threshold: float = setting(
        0.1, "vdam, and em while it explores: a class with less than this part of particles / classes starts anew from a large one",
        ge=0, lt=1,
    )  # fmt: skip

    def exploring(self, iteration: int) -> bool:
        """Whether this iteration of an em run takes half of the particles, all classes equally likely and filtered alike."""
        return self.method == "em" and iteration <= min(self.explore * self.iterations, self.iterations - 1)

    def reseed_threshold(self, iteration: int) -> float:
        """While a run explores a class that holds hardly anything starts anew."""
        return max(self.reseed_below, self.inactivity_threshold) if self.exploring(iteration) else self.reseed_below

    def sampling(self, pixel_size: float) -> Sampling:
        """The search grid, the same in every iteration."""
        return Sampling(
            order=0, offset_range=self.offset_range * pixel_size, offset_step=self.offset_step * pixel_size, oversampling=self.oversampling,
            factor=0.0 if self.skip_align else self.perturb, flat=True, psi_step=self.psi_step,
        )  # fmt: skip


def resolved(params: P, pixel_size: float) -> P:
    """The parameters with what depends on the method and the pixel size filled in."""
    filled: dict[str, float] = {"iterations": params.iterations or ITERATIONS[params.method]}
    if params.initial_lowpass <= 0:
        filled["initial_lowpass"] = pixel_size / FIRST_FREQUENCY
    if params.max_significant == 0:
        filled["max_significant"] = gradient.SIGNIFICANT * params.classes if params.method == "vdam" else MOST_SIGNIFICANT
    return params.model_copy(update=filled)


def _params(job: ClassifyJob) -> Class2dParams:
    assert isinstance(job.params, Class2dParams)
    return job.params


def new_averages(job: ClassifyJob, state: ClassifyState, statistics: Statistics, tau2: Tensor) -> Reconstruction:
    """Averages of all classes, centred if asked for, where the present ones are."""
    model = state.model
    alike = job.params.exploring(state.progress.iteration)
    made = planes.reconstruct_planes(statistics, tau2, model.box, job.engine, str(model.maps.device), alike=alike)
    return replace(made, maps=centred(job, made.maps, model.pixel_size))


def centred(job: ClassifyJob, maps: Tensor, pixel_size: float, unmoved: float = 0.0) -> Tensor:
    """The averages (K, N, N) with their centres of mass in the middle, moved by whole pixels up to the offset range, zeros coming in.

    What counts is the mask, or the particle's circle: in a crowded field the box beyond it holds neighbours, and the centre of mass of a
    particle with one of them lies between the two.
    """
    p = _params(job)
    if not p.center_classes:
        return maps
    radius = p.diameter / (2 * pixel_size) if p.diameter > 0 else maps.shape[-1] / 2 - p.mask_edge
    mask = planes.particle_circles(maps, radius) if job.mask is None else job.mask
    shift = planes.centre_offsets(maps, p.offset_range, mask)
    shift[shift.double().norm(dim=-1) < unmoved] = 0
    return planes.moved(maps, shift)


def flattened(job: ClassifyJob, maps: Tensor, pixel_size: float) -> Tensor:
    """Averages times the solvent mask (spec 3.6.10)."""
    p = _params(job)
    return planes.flatten_planes(maps, pixel_size, p.diameter, p.mask_edge, job.mask, job.mask2) if p.flatten_solvent else maps


FORM = Form(
    power=planes.plane_power, reconstruct=new_averages, finish=flattened, dims=2, keep_safe=1.5, accuracy_particles=10, keep_unmasked=True
)  # fmt: skip


@dataclass(frozen=True)
class GradientState(ClassifyState):
    """A state of a gradient run."""

    moments: gradient.Moments | None = None


def initial_state(job: ClassifyJob, particles: Particles, pixel_size: float, references: Tensor | None = None) -> ClassifyState:
    """Iteration 0: from averages of particles at random (spec 2.3), or from given ones (1 or K, N, N). job.params are `resolved`."""
    p = _params(job)
    psi = matrix_to_euler(particles.rotation)[:, 2]  # of poses in 3D, the in-plane angle
    particles = replace(particles, rotation=euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1)))
    generator = torch.Generator().manual_seed(job.engine.seed)
    first = random_averages(job, particles, pixel_size, generator) if references is None else references
    if p.method == "vdam" and references is None:
        box = first.shape[-1]
        diameter = (p.diameter if p.diameter > 0 else (box - p.mask_edge) * pixel_size) / pixel_size
        first = gradient.blobs(lowpass_map(first, pixel_size, p.initial_lowpass, dims=2), diameter, generator)
        first = first * soft_circle(box, diameter / 2, p.mask_edge).to(first)
    state = classify.initial_state(job, particles, first, pixel_size)
    model = replace(state.model, prior_offset=torch.zeros(p.classes, 2, dtype=torch.float64))
    state = replace(state, model=model)
    if p.method == "em":
        return state
    reference = planes.reference_planes(model.maps[:1], model.box, job.engine)
    return GradientState(**vars(state), moments=gradient.no_moments(p.classes, reference.shape[-1] - 1, reference))


def random_averages(job: ClassifyJob, particles: Particles, pixel_size: float, generator: torch.Generator) -> Tensor:
    """(K, N, N) averages of the first particles of a random order: class = number modulo K, in-plane angle random, CTF-weighted."""
    p, engine = _params(job), job.engine
    box = particles.optics[int(particles.group.min())].box
    shell = min(resolution_shell(box, pixel_size, p.initial_lowpass) + 2, box // 2)  # the filter's edge ends there
    order = torch.randperm(len(particles), generator=generator)[: max(FIRST_PARTICLES, 5 * p.classes)]
    psi = 360 * torch.rand(len(order), generator=generator, dtype=torch.float64)
    rotations = euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1)).to(device=engine.device, dtype=engine.dtype)
    klass = (torch.arange(len(order)) % p.classes).to(engine.device)
    none = torch.zeros(p.classes, box, box, dtype=engine.dtype, device=engine.device)
    data = torch.zeros_like(planes.reference_planes(none, 2 * shell, engine))
    weight = torch.zeros_like(data.real)
    model = neutral_model(none, pixel_size, particles)
    for g, optics in enumerate(particles.optics):
        mine = torch.nonzero(particles.group[order] == g)[:, 0]
        if len(mine) == 0:
            continue
        frame = make_frame(optics, 2 * shell, box, pixel_size, engine)
        for some in mine.split(max(1, (1 << 24) // optics.box**2)):
            index = order[some]
            w, at = make_windows(job.images[index], particles, index, frame, model, engine, g), some.to(engine.device)
            insert_(
                data, weight, w.masked * w.data_gain, w.weight_gain, rotations[at], frame.coords, engine.pad, which=klass[at],
                implementation=engine.implementation,
            )  # fmt: skip
    ft, _ = planes.divide(hermitian_planes(data), hermitian_planes(weight), None, engine.pad)
    return images_from_planes(ft, engine.pad, box).to(engine.dtype) / planes.interpolation(box, engine)


def neutral_model(maps: Tensor, pixel_size: float, particles: Particles) -> Model:
    """A model that says nothing yet: for reading particles before there is one."""
    k, shells = len(maps), torch.zeros(len(maps), maps.shape[-1] // 2 + 1, dtype=torch.float64)
    return Model(
        maps=maps, pixel_size=pixel_size, sigma2=tuple(torch.full((o.box // 2 + 1,), 0.5 / o.box**2) for o in particles.optics),
        scales=torch.ones(len(particles.micrographs), dtype=torch.float64), norm_average=float(particles.norm.mean()), sigma_offset=1.0,
        pdf_class=torch.full((k,), 1 / k, dtype=torch.float64), pdf_direction=torch.full((k, 1), 1 / k, dtype=torch.float64), tau2=shells,
        data_vs_prior=shells, fsc=shells[0], sigma2_map=shells, coverage=shells,
    )  # fmt: skip


def class2d(job: ClassifyJob, start: ClassifyState) -> Iterator[ClassifyState]:
    """States after each iteration, up to params.iterations."""
    if _params(job).method == "em":
        yield from classify.classify(job, start)
        return
    assert isinstance(start, GradientState)
    state = start
    while state.progress.iteration < job.params.iterations:
        state = gradient_step(job, state)
        yield state


def gradient_step(job: ClassifyJob, state: GradientState) -> GradientState:
    """One iteration of spec 5: a mini-batch in two pseudo-halves, a step of every average, running means of the parameters."""
    p, model = _params(job), state.model
    iteration = state.progress.iteration + 1
    plan = gradient.Schedule(p.iterations, len(state.particles))
    generator = torch.Generator().manual_seed(job.engine.seed + iteration)
    members = torch.randperm(len(state.particles), generator=generator)[: plan.batch(iteration)].sort().values
    size = window_size(state.progress, model.box)
    accuracy, volumes = state.accuracy, reference_volumes(model, size, job.engine)
    if iteration % 10 == 1:
        accuracy = classify.accuracies(job, state, size, False, (torch.arange(model.classes), volumes))
    best = accuracy.amin(0).tolist()
    sampling = replace(p.sampling(model.pixel_size), instance=state.sampling.instance)
    if not p.skip_align:
        sampling = sampling.perturbed(generator)
    progress = replace(state.progress, iteration=iteration, size=size, accuracy_rotation=best[0], accuracy_shift=best[1])
    progress = replace(progress, coarse_size=classify.coarse_size(job, sampling, model, size))
    before = replace(state, progress=progress, sampling=sampling, accuracy=accuracy)
    halves, poses, seconds, shrink = expect_halves(job, before, members, volumes)
    new = state.poses.with_part(members, poses)
    particles = replace(state.particles, rotation=new.rotation, shift=new.shift, norm=new.norm, klass=new.klass + 1)
    progress = classify.after_step(progress, state, particles, sampling, members)
    after = replace(before, progress=progress, particles=particles, poses=new, shrink=shrink)
    clock = Clock(job.engine.device)
    with clock("M-step"):
        after = descend(job, after, halves, particles[members], (plan, volumes))
        after = replace(after, model=job.world.agree(after.model))
    return replace(after, seconds=seconds | clock.seconds)


def expect_halves(job: ClassifyJob, state: GradientState, members: Tensor, volumes: Tensor):
    """E-step of the mini-batch's particles of either half apart: (two Statistics of residuals, Poses in order, seconds, shrink).

    Halves of the whole set, at random: each process takes every so-manieth particle, so even and odd numbers would not do.
    """
    residual = replace(job, engine=replace(job.engine, residual=True))
    statistics, seconds = [], {}
    poses = classify.Poses.empty(len(members))
    for h in (0, 1):
        mine = torch.nonzero(torch.isin(members, classify.half_of(len(state.particles), h, job.engine.seed)))[:, 0]
        sums, found, clock, shrink = classify.expect(residual, state, None, False, volumes, members[mine])
        state = replace(state, shrink=shrink)  # found once
        poses.put_(mine, found)
        statistics.append(sums)
        seconds = added(seconds, clock)
    return statistics, poses, seconds, state.shrink


def descend(
    job: ClassifyJob, state: GradientState, halves: list[Statistics], batch: Particles, step_of: tuple[gradient.Schedule, Tensor]
) -> GradientState:
    """The M-step of a gradient run; `halves` are used up. step_of: the schedule, and the half planes of the averages."""
    (plan, reference), p, model, engine, progress = step_of, _params(job), state.model, job.engine, state.progress
    assert state.moments is not None
    per_micrograph = torch.bincount(batch.micrograph, minlength=len(batch.micrographs)).double()
    # The parameters need both halves' sums but not their planes.
    a, b = (replace(s, data=s.data.new_zeros(1), weight=s.weight.new_zeros(1)) for s in halves)
    boxes = [o.box for o in batch.optics]
    found = update_parameters(model, a + b, boxes, per_micrograph, cc=False, norm=p.norm, scale=p.scale)
    found = gradient.smoothed(model, found)
    tau = plan.tau_fudge(progress.iteration, p.tau_fudge)
    tau2 = planes.plane_power(reference, model.box, engine.pad)
    sums = tuple((hermitian_planes(s.data).to(reference), hermitian_planes(s.weight).to(reference.real)) for s in halves)
    step = plan.step(progress.iteration)
    new, moments, snr, power = gradient.descend(reference, (sums[0], sums[1]), state.moments, found.pdf_class, engine.pad, step, tau)
    box = model.box
    # The planes' slices are what the data are compared with, and interpolation dims their edges: the average is that much dimmer.
    maps = images_from_planes(new, engine.pad, box).to(engine.dtype) * planes.interpolation(box, engine)
    if plan.between(progress.iteration) and (pair := gradient.inactive_class(found.pdf_class, power, p.inactivity_threshold)):
        maps, moments, found = revived(maps, moments, found, *pair)
    diameter = p.diameter / model.pixel_size if p.diameter > 0 else box
    unmasked = centred(job, maps, model.pixel_size, max(UNMOVED[0] * diameter, UNMOVED[1]))
    # SSNR as the whole set would have it: the mini-batch's weights, times what it is of the set.
    weight = (sums[0][1] + sums[1][1]) * (len(state.particles) / max(1, len(batch)))
    ssnr = planes.data_vs_prior(weight, tau * tau2, engine.pad)
    progress = after_classification(replace(progress, ave_pmax=found.ave_pmax), int(class_shells(ssnr).max()), box * model.pixel_size)
    coverage = planes.completeness(weight, tau * tau2, engine.pad).cpu()
    found = replace(found, maps=flattened(job, unmasked, model.pixel_size), tau2=tau2, data_vs_prior=ssnr, coverage=coverage)
    return replace(state, progress=progress, model=found, unmasked=unmasked, moments=moments)


def revived(maps: Tensor, moments: gradient.Moments, model: Model, poor: int, donor: int) -> tuple[Tensor, gradient.Moments, Model]:
    """The averages, moments and priors with class `poor` a copy of `donor`, its momenta × 0.9 and half of the donor's share."""
    maps, first, second, share = maps.clone(), moments.first.clone(), moments.second.clone(), model.pdf_class.clone()
    maps[poor] = maps[donor]
    first[:, poor], second[poor] = gradient.MOMENTUM * first[:, donor], second[donor]
    share[poor] = share[donor] = 0.5 * (share[poor] + share[donor])
    flat = share[:, None] * model.pdf_direction.new_ones(model.pdf_direction.shape) / model.pdf_direction.shape[1]
    return maps, gradient.Moments(first, second, True), replace(model, pdf_class=share, pdf_direction=flat)
