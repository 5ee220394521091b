"""Classification by expectation and maximisation: the loop that 2D and 3D classes share (spec/refinement 2, 3.3a, 3.6, 3.8, 3.9, 4.2).

`classify` yields a frozen ClassifyState an iteration; anything can be resumed from any of them. There are no half sets: τ² comes from
the power of the map before. What depends on the dimension of the references is a `Form` (steps/class3d.py, steps/class2d.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.maths.filters import lowpass_map, lowpass_shell, lowpass_weights
from frazil.maths.fourier import resolution_shell
from frazil.maths.symmetry import operators
from frazil.refine import settings
from frazil.refine.accuracy import expected_accuracies
from frazil.refine.classes import Reconstruction, class_shells, classes_of, copied, first_data_vs_prior, spread
from frazil.refine.convergence import (
    Progress,
    after_changes,
    after_classification,
    changes,
    coarse_window,
    window_size,
)
from frazil.refine.expectation import Given, expectation
from frazil.refine.initial import initial_noise
from frazil.refine.maximization import update_parameters
from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.parallel import World, with_less_memory
from frazil.refine.planner import keep_on_device
from frazil.refine.residence import share
from frazil.refine.sampling import Sampling, fixed_grid, make_grid
from frazil.refine.search import reference_volumes
from frazil.refine.settings import MatchParams, Settings, setting
from frazil.refine.timing import Clock
from frazil.refine.windows import Engine

log = logging.getLogger("frazil.classify")
UNKNOWN = 999.0  # an accuracy that was not estimated
LEAST_SHARE = 0.01  # accuracies are estimated for classes with at least this share of the particles (spec 4.4)


class Start(Settings):
    """What a classification starts from and how it searches (apart from ClassifyParams for the order of the parameters alone)."""

    classes: int = setting(1, "number of classes", level="basic", ge=1)
    tau_fudge: float = setting(4.0, "factor on the signal prior: larger trusts the data more and finer detail sooner", level="basic", gt=0)
    diameter: float = setting(-1.0, "diameter of the circular mask on the particles; -1: the box less the mask's edge", "Å", "basic")
    initial_lowpass: float = setting(60.0, "low-pass filter of the references before the first iteration", "Å", "basic", gt=0)
    offset_range: float = setting(5.0, "range of the shift search", "px", gt=0)
    offset_step: float = setting(2.0, "coarse step of the shift search", "px", gt=0)
    oversampling: int = setting(1, "times the coarse grid is halved in the fine pass", ge=1, le=3)
    firstiter_cc: bool = setting(True, "first iteration by cross-correlation: the references need not be on the particles' grey scale")
    zero_mask: bool = setting(True, "fill the particles outside the mask with zeros, not with noise")
    flatten_solvent: bool = setting(True, "mask the references between iterations: given mask, or a sphere (circle) of the diameter")


class ClassifyParams(MatchParams, Start):
    """What 2D and 3D classification have in common."""

    skip_align: bool = setting(False, "keep orientations and shifts, find classes only")
    skip_rotate: bool = setting(False, "keep orientations, search shifts and classes")
    strict_highres: float | None = setting(None, "finest resolution the images are compared at; none: as far as the maps go", "Å", gt=0)
    reseed_below: float = setting(
        0.0, "a class with less than this part of particles / classes starts anew from half of the largest one; 0: never", ge=0, lt=1
    )
    iterations: int = setting(25, "iterations", level="basic", ge=1)

    def sampling(self, pixel_size: float) -> Sampling:
        """The search grid the run starts with."""
        raise NotImplementedError

    def exploring(self, iteration: int) -> bool:
        """Whether classes are held from taking one another's particles in this iteration (docs/steps/class2d.md)."""
        return False

    def reseed_threshold(self, iteration: int) -> float:
        """The part of particles / classes below which a class starts anew after this iteration; 0: none does."""
        return self.reseed_below

    def next_sampling(self, progress: Progress, last: Sampling, box: int, pixel_size: float) -> Sampling:
        """The search grid of iteration `progress.iteration` (without the perturbation) after `last`; by default always the first."""
        return self.sampling(pixel_size)


@dataclass(frozen=True)
class Form:
    """What depends on the dimension of the references. `power` and `reconstruct` take and give all classes at once."""

    power: Callable[[Tensor, int, float], Tensor]  # (half volumes, box, padding) → (K, N/2+1) τ², spec 3.3a
    reconstruct: Callable[[ClassifyJob, ClassifyState, Statistics, Tensor], Reconstruction]  # (job, state, sums (used up), T·τ²)
    finish: Callable[[ClassifyJob, Tensor, float], Tensor]  # (job, maps, pixel size) → centred and solvent-flattened maps
    dims: int = 3
    keep_safe: float = 1.2  # of the coarse window (spec 2.3): 1.5 in 2D
    accuracy_particles: int = 100  # 10 in 2D
    each_its_own: bool = False  # processes make the maps of their own classes only
    keep_unmasked: bool = False  # keep the maps before `finish` in the state


@dataclass(frozen=True)
class ClassifyJob:
    """What does not change during a classification."""

    images: Images
    params: ClassifyParams
    engine: Engine
    form: Form
    mask: Tensor | None = None  # solvent mask (N, N, N) in [0, 1]
    mask2: Tensor | None = None  # its region is set to its own mean
    mask_lowpass: Tensor | None = None  # its region stays, low-passed to params.mask_lowpass_resolution
    tick: Callable[[int], None] = lambda done: None  # particles done in this iteration; may raise to stop
    world: World = field(default_factory=World)  # the processes that share the particles


@dataclass(frozen=True)
class ClassifyState:
    """Everything there is after an iteration (iteration 0: before the first)."""

    progress: Progress
    sampling: Sampling
    model: Model
    particles: Particles
    poses: Poses
    accuracy: Tensor  # (K, 2) float64 expected error of rotation (degrees) and shift (Å) of each class; 999: not known
    assigned: Tensor | None = None  # (n,) int64 the class each particle must take in the next likelihood iteration, -1: any; None: any
    emptied: tuple[int, ...] = ()  # classes that lost their last particle, or were seeded anew, in this iteration
    unmasked: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    shrink: int = 1  # batches are that much smaller than planned, since the device ran out of memory
    maps_in_main: bool = False  # the M-step is made in main memory, since the device ran out of memory outside the batches


def make_engine(params: ClassifyParams, **more: Any) -> Engine:
    """Engine settings of a classification; more: those of settings.make_engine."""
    return settings.make_engine(params, diameter=params.diameter, zero_mask=params.zero_mask, **more)


def initial_state(job: ClassifyJob, particles: Particles, references: Tensor, pixel_size: float) -> ClassifyState:
    """Iteration 0 from K references (K, N, …), or from one for all classes, which are then seeded at random (spec 2.3)."""
    p, engine, n = job.params, job.engine, references.shape[-1]
    place = engine.device if keep_on_device(p.classes, n, job.form.dims == 2, engine.budget) else "cpu"
    maps = lowpass_map(references.to(device=place, dtype=engine.dtype), pixel_size, p.initial_lowpass, dims=job.form.dims)
    assigned = None
    if len(maps) < p.classes:
        generator = torch.Generator().manual_seed(engine.seed)
        assigned = torch.randint(p.classes, (len(particles),), generator=generator)
        maps = maps[:1].expand(p.classes, *maps.shape[1:])
    sampling = p.sampling(pixel_size)
    noise = initial_noise(job.images, particles, (n, pixel_size), engine)
    shell = lowpass_shell(n, pixel_size, p.initial_lowpass)
    pdf = torch.full((p.classes,), 1 / p.classes, dtype=torch.float64)
    zero = torch.zeros(p.classes, n // 2 + 1, dtype=torch.float64)
    directions = make_grid(sampling).directions if not keeps_orientations(p) else 1
    model = Model(
        maps=maps, pixel_size=pixel_size, sigma2=noise, scales=torch.ones(len(particles.micrographs), dtype=torch.float64),
        norm_average=float(particles.norm.mean()), sigma_offset=p.sigma_offset, pdf_class=pdf,
        pdf_direction=pdf[:, None].expand(-1, directions) / directions, tau2=zero, data_vs_prior=zero, fsc=zero[0], sigma2_map=zero,
        coverage=zero,
    )  # fmt: skip
    one = model if assigned is None else classes_of(model, torch.tensor([0]))
    volumes = reference_volumes(one, min(n, 2 * (shell + 10)), engine)
    tau2 = job.form.power(volumes, n, engine.pad).expand(p.classes, -1)
    ssnr = first_data_vs_prior(tau2, noise[int(particles.group.min())], len(particles) * pdf)
    model = replace(model, tau2=tau2, data_vs_prior=ssnr)
    poses = replace(
        Poses.empty(len(particles)), rotation=particles.rotation, shift=particles.shift, norm=particles.norm,
        klass=(particles.klass - 1).clamp(min=0),
    )  # fmt: skip
    unknown = torch.full((p.classes, 2), UNKNOWN, dtype=torch.float64)
    return ClassifyState(Progress(iteration=0, shell=shell), sampling, model, particles, poses, unknown, assigned)


def keeps_orientations(params: ClassifyParams) -> bool:
    """Whether no orientation is searched."""
    return params.skip_align or params.skip_rotate


def classify(job: ClassifyJob, start: ClassifyState) -> Iterator[ClassifyState]:
    """States after each iteration, up to params.iterations."""
    state = start
    while state.progress.iteration < job.params.iterations:
        state = iterate(job, state)
        yield state


def iterate(job: ClassifyJob, state: ClassifyState) -> ClassifyState:
    """One iteration of spec 4.1.

    Batches that do not fit the device's memory are halved; where it runs out elsewhere the iteration begins again with maps and M-step
    in main memory. Both are kept for the iterations after. Of several processes the others wait for this one: there it is an error.
    """
    try:
        return _iterate(job, state)
    except torch.OutOfMemoryError:
        if state.maps_in_main or job.world.size > 1:
            raise
        log.warning("out of memory on %s: maps are kept and made in main memory from now on", job.engine.device)
    torch.cuda.empty_cache()
    return _iterate(job, replace(state, model=replace(state.model, maps=state.model.maps.cpu()), maps_in_main=True))


def _iterate(job: ClassifyJob, state: ClassifyState) -> ClassifyState:
    p, model = job.params, state.model
    iteration = state.progress.iteration + 1
    cc = iteration == 1 and p.firstiter_cc
    generator = torch.Generator().manual_seed(job.engine.seed + iteration)
    size = window_size(state.progress, model.box)
    # One reference for all classes: a cross-correlation iteration makes one map of all particles, which is copied (spec 2.3).
    seeds = cc and state.assigned is not None
    live = torch.tensor([0]) if seeds else torch.nonzero(model.pdf_class > 0)[:, 0]
    clock = Clock(job.engine.device)
    with clock("reference"):  # once for accuracies, E-step and signal power
        volumes = reference_volumes(classes_of(model, live), size, job.engine)
        tau2 = job.form.power(volumes, model.box, job.engine.pad)
    with clock("accuracies"):
        accuracy = accuracies(job, state, size, cc, (live, volumes))
    best = accuracy.amin(0).tolist()
    progress = replace(state.progress, iteration=iteration, accuracy_rotation=best[0], accuracy_shift=best[1])
    sampling = replace(p.next_sampling(progress, state.sampling, model.box, model.pixel_size), instance=state.sampling.instance)
    if not p.skip_align:
        sampling = sampling.perturbed(generator)
    explore = p.exploring(iteration)
    members = half_of(len(state.particles), iteration, job.engine.seed) if explore else None
    model = with_directions(model, sampling, p)
    progress = replace(progress, size=size, coarse_size=coarse_size(job, sampling, model, size))
    numbered = replace(state.particles, klass=at_live_classes(state.particles.klass - 1, live, model.classes) + 1)
    alive = classes_of(model, live)
    before = replace(
        state, progress=progress, sampling=sampling, model=equally_likely(alive) if explore else alive, particles=numbered,
        accuracy=accuracy,
    )  # fmt: skip
    assigned = None if cc or state.assigned is None else at_live_classes(state.assigned, live, model.classes)
    statistics, found, seconds, shrink = expect(job, before, assigned, cc, volumes, members)
    del volumes  # the M-step wants the memory
    if state.maps_in_main:
        statistics = replace(statistics, data=statistics.data.cpu(), weight=statistics.weight.cpu())
    poses = state.poses.with_part(members, replace(found, klass=live[found.klass]))
    particles = replace(state.particles, rotation=poses.rotation, shift=poses.shift, norm=poses.norm, klass=poses.klass + 1)
    progress = after_step(progress, state, particles, sampling, members)
    after = replace(before, progress=progress, particles=particles, poses=poses, assigned=state.assigned if seeds else None, shrink=shrink)
    with clock("M-step"):
        batch = particles if members is None else particles[members]
        after = replace(maximize(job, replace(after, particles=batch), statistics, cc, tau2), particles=particles)
        full = copied(after.model, model.classes) if seeds else spread(after.model, live, model.classes)
        full = job.world.agree(full, but=("maps",) if job.form.each_its_own else ())
        after = replace(after, model=full, unmasked=all_unmasked(after.unmasked, live, full, seeds))
        after = reseeded(job, after, model.pdf_class, generator)
    return replace(after, seconds=clock.seconds | seconds)


def half_of(n: int, iteration: int, seed: int) -> Tensor:
    """Numbers of one half of n particles in odd iterations and of the other in even ones, the same halves throughout."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return (order[: n // 2] if iteration % 2 else order[n // 2 :]).sort().values


def equally_likely(model: Model) -> Model:
    """The model with classes, and directions, of equal prior probability."""
    flat = torch.full_like(model.pdf_direction, 1 / model.pdf_direction.numel())
    return replace(model, pdf_class=flat.sum(1), pdf_direction=flat)


def after_step(progress: Progress, before: ClassifyState, after: Particles, sampling: Sampling, members: Tensor | None) -> Progress:
    """The progress with what changed of the poses and classes of those particles that took part (members; None: all)."""
    one, two = (q if members is None else q[members] for q in (before.particles, after))
    klass = before.poses.klass if members is None else before.poses.klass[members]
    moved = changes(one.rotation, two.rotation, one.shift, two.shift, operators(sampling.group))
    return after_changes(progress, *moved, sampling, float((two.klass - 1 != klass).double().mean()))


def accuracies(job: ClassifyJob, state: ClassifyState, size: int, cc: bool, references: tuple[Tensor, Tensor]) -> Tensor:
    """(K, 2) expected errors (degrees, Å) of the larger classes from some random particles at their present poses; 999: not known.

    references: classes and their half volumes. Of several processes each looks at its own classes.
    """
    out = torch.full((state.model.classes, 2), UNKNOWN, dtype=torch.float64)
    if cc or state.progress.iteration == 0 or job.params.skip_align:
        return out
    generator, world = torch.Generator().manual_seed(job.engine.seed + state.progress.iteration + 1), job.world
    some = state.particles[torch.randperm(len(state.particles), generator=generator)[: job.form.accuracy_particles]]
    if job.params.strict_highres:
        size = min(size, strict_size(job.params.strict_highres, state.model))
    large = torch.nonzero(state.model.pdf_class >= LEAST_SHARE)[:, 0]
    found, own = torch.zeros_like(out), large[world.rank :: world.size]
    if len(own):  # what is drawn does not depend on the class: the same whichever process looks at it
        made = references[1], torch.searchsorted(references[0], own)
        found[own] = expected_accuracies(some, state.model, own, job.engine, size, generator, made)
    out[large] = world.add_up_(found)[large]
    return out


def strict_size(resolution: float, model: Model) -> int:
    """Side of the window whose edge is at a resolution in Å (spec 2.6, --strict_highres_exp)."""
    return 2 * max(1, resolution_shell(model.box, model.pixel_size, resolution))


def coarse_size(job: ClassifyJob, sampling: Sampling, model: Model, size: int) -> int:
    """n_0: side of the window of the coarse pass (of both passes with strict_highres)."""
    p = job.params
    if p.strict_highres:
        return min(size, strict_size(p.strict_highres, model))
    if p.skip_align:
        return size
    return coarse_window(sampling, model.box, model.pixel_size, p.diameter, size, job.form.keep_safe)


def with_directions(model: Model, sampling: Sampling, params: ClassifyParams) -> Model:
    """The model with a direction prior for this sampling: its own, or a flat one where the directions are others."""
    n = 1 if keeps_orientations(params) else make_grid(sampling).directions
    if model.pdf_direction.shape[1] == n:
        return model
    return replace(model, pdf_direction=model.pdf_class[:, None].expand(-1, n) / n)


def all_unmasked(maps: Tensor | None, live: Tensor, model: Model, same: bool) -> Tensor | None:
    """Maps before masking for all classes: those of the live ones and zeros, or the same one for all."""
    if maps is None or len(maps) == model.classes:
        return maps
    out = maps.new_zeros(model.classes, *maps.shape[1:])
    out[slice(None) if same else live.to(out.device)] = maps
    return out


def at_live_classes(assigned: Tensor, live: Tensor, classes: int) -> Tensor:
    """Class numbers (-1: any or none) as numbers among the live ones; -1 for those that live no more."""
    place = torch.full((classes + 1,), -1, dtype=torch.int64)
    place[live] = torch.arange(len(live))
    return place[assigned]  # -1 takes the last entry, which is -1


def expect(
    job: ClassifyJob, state: ClassifyState, assigned: Tensor | None, cc: bool, volumes: Tensor | None = None,
    members: Tensor | None = None,
) -> tuple[Statistics, Poses, dict[str, float], int]:  # fmt: skip
    """E-step of all particles, or of the `members` (n,) of them in that order, with the state's model, sampling and sizes, shared out
    among the processes; volumes: the model's. Also how much smaller than planned its batches had to be.
    """
    p, world, progress = job.params, job.world, state.progress
    n = len(state.particles) if members is None else len(members)
    mine = world.share(n, members)
    index = mine if members is None else members[mine]
    particles, images = state.particles, job.images
    if len(index) < len(particles):
        particles, images = particles[index], share(images, index)
    if keeps_orientations(p):
        grid = fixed_grid(particles.rotation, None if p.skip_align else state.sampling)
    else:
        grid = make_grid(state.sampling)

    def work(engine: Engine) -> tuple[Statistics, Poses, dict[str, float]]:
        return expectation(
            images, particles, state.model, grid, engine,
            (progress.size, progress.coarse_size), tick=lambda done: job.tick(done * world.size),
            given=Given(None if assigned is None else assigned[index], volumes),
        )  # fmt: skip

    engine = replace(
        job.engine, cc=cc, subpixel=p.skip_align, strict=p.strict_highres is not None, shrink=max(job.engine.shrink, state.shrink)
    )
    (statistics, poses, seconds), shrink = with_less_memory(engine, work)
    return world.total(statistics), world.gather(poses, n, members), seconds, shrink


def maximize(job: ClassifyJob, state: ClassifyState, statistics: Statistics, cc: bool, tau2: Tensor) -> ClassifyState:
    """The M-step: parameters, maps and spectra of the state's classes (spec 3.6) with the references' τ²; `statistics` are used up."""
    p, model, progress = job.params, state.model, state.progress
    box, pixel_size = model.box, model.pixel_size
    particles = state.particles
    per_micrograph = torch.bincount(particles.micrograph, minlength=len(particles.micrographs)).double()
    boxes = [o.box for o in particles.optics]
    updated = update_parameters(model, statistics, boxes, per_micrograph, cc=cc, norm=p.norm, scale=p.scale)
    made = job.form.reconstruct(job, state, statistics, p.tau_fudge * tau2)
    maps, ssnr = made.maps, made.data_vs_prior
    if cc:
        maps = lowpass_map(maps, pixel_size, p.initial_lowpass, dims=job.form.dims)
        keep = lowpass_weights(torch.arange(box // 2 + 1, dtype=torch.float64), box, pixel_size, p.initial_lowpass).square()
        tau2, ssnr = tau2 * keep, ssnr * keep
    finished = job.form.finish(job, maps, pixel_size)
    if job.form.each_its_own:
        job.world.add_up_(finished)
    updated = replace(
        updated, maps=finished, tau2=tau2, data_vs_prior=ssnr, sigma2_map=made.sigma2_map,
        coverage=made.coverage,
    )  # fmt: skip
    shell = lowpass_shell(box, pixel_size, p.initial_lowpass) if cc else int(class_shells(ssnr).max())
    progress = after_classification(replace(progress, ave_pmax=updated.ave_pmax), shell, box * pixel_size)
    return replace(state, progress=progress, model=updated, unmasked=maps if job.form.keep_unmasked else None)


def reseeded(job: ClassifyJob, state: ClassifyState, share_before: Tensor, generator: torch.Generator) -> ClassifyState:
    """The state with its new empty classes named; with reseed_below, classes that are too small start anew from half of the largest.

    The largest class's map is copied and its particles are split between the two at random for one iteration: two equal maps would
    stay equal for ever.
    """
    p, model, threshold = job.params, state.model, job.params.reseed_threshold(state.progress.iteration)
    share = model.pdf_class.clone()
    if threshold == 0 or state.progress.iteration == p.iterations or model.classes == 1:
        return replace(state, emptied=tuple(torch.nonzero((share == 0) & (share_before > 0))[:, 0].tolist()))
    poor = torch.nonzero(share < threshold / model.classes)[:, 0].tolist()
    source = torch.arange(model.classes)
    klass, assigned = state.poses.klass.clone(), torch.full((len(state.particles),), -1, dtype=torch.int64)
    for k in poor:
        donor = int(share.argmax())
        source[k] = source[donor]
        share[k] = share[donor] = share[donor] / 2
        mine = torch.nonzero(klass == donor)[:, 0]
        moved = mine[torch.rand(len(mine), generator=generator) < 0.5]
        klass[moved] = k
        assigned[mine], assigned[moved] = donor, k
    if not poor:
        return state
    model = classes_of(model, source) if len(poor) else model
    flat = model.pdf_direction / model.pdf_direction.sum(1, keepdim=True).clamp(min=1e-300)
    share = share / share.sum()
    return replace(
        state, model=replace(model, pdf_class=share, pdf_direction=share[:, None] * flat), assigned=assigned,
        emptied=() if p.exploring(state.progress.iteration) else tuple(poor),
    )
