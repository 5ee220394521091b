"""Gold-standard auto-refinement: two halves refined apart, joined at the end (spec/refinement 3, 4.1, 4.5).

`refine3d` yields a frozen State an iteration; anything can be resumed from any of them. The mathematics is in refine/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from frazil.data import Images, Particles, Volume
from frazil.maths.filters import lowpass_map, lowpass_shell, lowpass_weights
from frazil.maths.fsc import corrected_fsc
from frazil.maths.symmetry import operators
from frazil.refine import maximization as m_step
from frazil.refine import settings
from frazil.refine.accuracy import expected_accuracy
from frazil.refine.convergence import (
    Progress,
    after_changes,
    after_maximization,
    changes,
    coarse_window,
    is_converged,
    next_sampling,
    resolution_step,
    window_size,
)
from frazil.refine.expectation import expectation
from frazil.refine.initial import initial_noise, split_halves
from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.parallel import with_less_memory
from frazil.refine.residence import share
from frazil.refine.sampling import Grid, Sampling, make_grid
from frazil.refine.settings import MatchParams, Settings, setting
from frazil.refine.timing import added
from frazil.refine.windows import Engine

ACCURACY_PARTICLES = 100


class Start(Settings):
    """What a refinement starts from and how it searches first (apart from Refine3dParams for the order of the parameters alone)."""

    initial_lowpass: float = setting(60.0, "low-pass filter of the reference before the first iteration", "Å", "basic", gt=0)
    symmetry: str = setting("C1", "point group of the particle: Cn, Dn, T, O, I, I1 to I4", level="basic")
    diameter: float = setting(-1.0, "diameter of the circular mask on the particles; -1: the box less the mask's edge", "Å", "basic")
    healpix_order: int = setting(2, "HEALPix order of the first coarse orientation grid (2: 15 degrees, 7.5 oversampled)", ge=0, le=7)
    local_from_order: int = setting(
        4, "order from which each particle searches only near its last orientation (4: 3.7 degrees coarse)", ge=1, le=8
    )
    offset_range: float = setting(10.0, "range of the first shift search", "px", gt=0)
    offset_step: float = setting(2.0, "coarse step of the first shift search", "px", gt=0)
    oversampling: int = setting(1, "times the coarse grid is halved in the fine pass", ge=1, le=3)
    firstiter_cc: bool = setting(True, "first iteration by cross-correlation: the reference need not be on the particles' grey scale")
    tau_fudge: float = setting(1.0, "factor on the signal prior; above 1 the resolution shown during the run is inflated", gt=0)
    low_resolution_join: float = setting(
        40.0, "the halves share their signal up to this resolution, so that they keep one orientation", "Å", gt=0
    )
    zero_mask: bool = setting(True, "fill the particles outside the mask with zeros, not with noise")
    flatten_solvent: bool = setting(True, "mask the references between iterations: given mask, or sphere of the diameter")
    solvent_correct_fsc: bool = setting(False, "use the mask-corrected FSC of the halves during refinement (needs a mask)")


class Refine3dParams(MatchParams, Start):
    """Gold-standard auto-refinement of one map from particles and a rough reference."""

    max_order: int | None = setting(None, "finest coarse HEALPix order to go to; none: as the accuracy asks")
    sample_to_accuracy: bool = setting(
        False, "refine the sampling until its step is 0.75 of the expected accuracy, as RELION does, even below d/2D"
    )
    iterations: int = setting(999, "iterations after which an unconverged run stops, without joining the halves", ge=1)


@dataclass(frozen=True)
class State:
    """Everything there is after an iteration (iteration 0: before the first)."""

    progress: Progress
    sampling: Sampling
    models: tuple[Model, Model]
    particles: Particles
    poses: Poses
    seconds: dict[str, float] = field(default_factory=dict)
    joined: Model | None = None  # the final map and its spectra
    unfiltered: tuple[Tensor, Tensor] | None = None  # final half maps, unregularised, independent at all resolutions
    shrink: int = 1  # batches are that much smaller than planned, since the device ran out of memory


@dataclass(frozen=True)
class Job:
    """What does not change during a refinement."""

    images: Images
    params: Refine3dParams
    engine: Engine
    mask: Tensor | None = None  # solvent mask (N, N, N) in [0, 1]
    mask2: Tensor | None = None
    tick: Callable[[int], None] = lambda done: None  # particles done in this iteration; may raise to stop


def make_engine(params: Refine3dParams, **more: Any) -> Engine:
    """Engine settings of a refinement; more: those of settings.make_engine."""
    return settings.make_engine(params, diameter=params.diameter, zero_mask=params.zero_mask, **more)


def initial_state(job: Job, particles: Particles, reference: Volume) -> State:
    """Iteration 0: halves, low-passed reference, first noise spectra and priors."""
    p, n = job.params, reference.data.shape[-1]
    particles = split_halves(particles, job.engine.seed)
    particles = replace(particles, prior_rotation=None)
    first = lowpass_map(reference.data.to(job.engine.dtype), reference.pixel_size, p.initial_lowpass)
    sampling = Sampling(
        order=p.healpix_order, offset_range=p.offset_range * reference.pixel_size, offset_step=p.offset_step * reference.pixel_size,
        oversampling=p.oversampling, group=p.symmetry, factor=p.perturb,
    )  # fmt: skip
    if p.healpix_order >= p.local_from_order:
        sampling = replace(sampling, sigma=2 * sampling.step)
    directions = make_grid(sampling).directions
    shells = torch.zeros(1, n // 2 + 1, dtype=torch.float64)
    noise = initial_noise(job.images, particles, (n, reference.pixel_size), job.engine)
    model = Model(
        maps=first[None], pixel_size=reference.pixel_size, sigma2=noise, scales=torch.ones(len(particles.micrographs), dtype=torch.float64),
        norm_average=float(particles.norm.mean()), sigma_offset=p.sigma_offset, pdf_class=torch.ones(1, dtype=torch.float64),
        pdf_direction=torch.full((1, directions), 1 / directions, dtype=torch.float64), tau2=shells, data_vs_prior=shells.clone(),
        fsc=shells[0].clone(), sigma2_map=shells.clone(), coverage=shells.clone(),
    )  # fmt: skip
    start = Progress(iteration=0, shell=lowpass_shell(n, reference.pixel_size, p.initial_lowpass))
    poses = replace(Poses.empty(len(particles)), rotation=particles.rotation, shift=particles.shift, norm=particles.norm)
    return State(start, sampling, (model, model), particles, poses)


def refine3d(job: Job, start: State) -> Iterator[State]:
    """States after each iteration, the last one converged with `joined` and `unfiltered` set (unless the iterations run out)."""
    state = start
    while not state.progress.converged and state.progress.iteration < job.params.iterations:
        state = iterate(job, state)
        yield state


def iterate(job: Job, state: State) -> State:
    """One iteration of spec 4.1."""
    p, progress, sampling, models = job.params, state.progress, state.sampling, state.models
    iteration = progress.iteration + 1
    last = is_converged(progress)
    cc = iteration == 1 and p.firstiter_cc
    box, pixel_size = models[0].box, models[0].pixel_size
    size = window_size(progress, box, everything=last)
    generator = torch.Generator().manual_seed(job.engine.seed + iteration)
    if not cc:
        progress = replace(progress, **accuracies(job, state, size, generator))
    if iteration > 1 and not last:
        enough = 0.0 if p.sample_to_accuracy else resolution_step(models[0].fsc, box, pixel_size, p.diameter)
        progress, sampling, changed = next_sampling(progress, sampling, p.local_from_order, p.max_order, enough)
        if changed:
            models = (with_uniform_directions(models[0], sampling), with_uniform_directions(models[1], sampling))
    coarse = coarse_window(sampling, box, pixel_size, p.diameter, size)
    sampling = sampling.perturbed(generator)
    progress = replace(progress, iteration=iteration, size=size, coarse_size=coarse, converged=last)
    statistics, poses, seconds, shrink = expect(job, state.particles, models, make_grid(sampling), (size, coarse), cc, state.shrink)
    moved = changes(state.particles.rotation, poses.rotation, state.particles.shift, poses.shift, operators(p.symmetry))
    progress = after_changes(progress, *moved, sampling)
    particles = replace(state.particles, rotation=poses.rotation, shift=poses.shift, norm=poses.norm, klass=poses.klass + 1)
    after = replace(state, progress=progress, sampling=sampling, particles=particles, poses=poses, seconds=seconds, shrink=shrink)
    return maximize(job, after, models, statistics, cc)


def accuracies(job: Job, state: State, size: int, generator: torch.Generator) -> dict[str, float]:
    """Expected accuracies from up to 100 random particles of half 1 at their present poses (before the first E-step: none known)."""
    if state.progress.iteration == 0:
        return {}
    half = torch.nonzero(state.particles.half == 1)[:, 0]
    some = half[torch.randperm(len(half), generator=generator)[:ACCURACY_PARTICLES]]
    rotation, shift = expected_accuracy(state.particles[some], state.models[0], 0, job.engine, size, generator)
    return {"accuracy_rotation": rotation, "accuracy_shift": shift}


def with_uniform_directions(model: Model, sampling: Sampling) -> Model:
    """The model with a flat direction prior for another sampling."""
    n = make_grid(sampling).directions
    return replace(model, pdf_direction=model.pdf_class[:, None] * torch.full((1, n), 1 / n, dtype=torch.float64))


def expect(
    job: Job, particles: Particles, models: tuple[Model, Model], grid: Grid, sizes: tuple[int, int], cc: bool, shrink: int = 1
) -> tuple[list[Statistics], Poses, dict[str, float], int]:
    """E-step of both halves; sums wait in host memory where two pairs of volumes do not fit the device's budget.

    shrink, given and returned: how much smaller than planned the batches are, since the device ran out of memory.
    """
    poses, seconds, statistics, before = Poses.empty(len(particles)), {}, [], 0
    for h in (1, 2):
        members = torch.nonzero(particles.half == h)[:, 0]
        tick = lambda done, before=before: job.tick(before + done)  # noqa: E731
        images, some = share(job.images, members), particles[members]

        def work(engine: Engine, images=images, some=some, model=models[h - 1], tick=tick):
            return parked(engine, *expectation(images, some, model, grid, replace(engine, cc=cc), sizes, tick=tick))

        (sums, part, clock), shrink = with_less_memory(replace(job.engine, shrink=max(shrink, job.engine.shrink)), work)
        poses.put_(members, part)
        statistics.append(sums)
        seconds = added(seconds, clock)
        before += len(members)
    return statistics, poses, seconds, shrink


def parked(engine: Engine, s: Statistics, *rest: Any) -> tuple[Statistics, Any, Any]:
    """What an E-step gives, its volumes in main memory if the M-step has no room on the GPU: it holds about four such pairs."""
    if engine.device == "cpu" or 4 * (s.data.nbytes + s.weight.nbytes) < engine.budget:
        return s, *rest
    return replace(s, data=s.data.cpu(), weight=s.weight.cpu()), *rest


def workplace(engine: Engine, s: Statistics, group: str) -> str:
    """Where one half at a time is worked on in the M-step: the GPU if its sums fit beside their workspace, else main memory."""
    need = (1.6 if group.upper() == "C1" else 2.8) * (s.data.nbytes + s.weight.nbytes)
    return engine.device if engine.device != "cpu" and need < engine.budget else "cpu"


def maximize(job: Job, state: State, models: tuple[Model, ...], statistics: list[Statistics], cc: bool) -> State:
    """The M-step: join, FSC, maps, parameters (spec 3.6)."""
    p, engine, progress = job.params, job.engine, state.progress
    box, pixel_size, pad = models[0].box, models[0].pixel_size, p.pad
    shared_shell = math.ceil(box * pixel_size / max(p.low_resolution_join, box * pixel_size / progress.shell))
    home, where = statistics[0].data.device, workplace(engine, statistics[0], p.symmetry)
    sums, low = [], []
    for s in statistics:
        data, weight = m_step.prepare_sums_(s.data[0].to(where), s.weight[0].to(where), p.symmetry, engine.implementation)
        data, weight = data.to(home), weight.to(home)
        low.append(m_step.low_resolution_part(data, weight, pad, shared_shell))
        sums.append((data, weight))
    unfiltered = None
    if progress.converged or p.solvent_correct_fsc:
        raw = [m_step.reconstruct(d.to(where, copy=True), w.to(where), None, pad, box, engine.dtype)[0].cpu() for d, w in sums]
        unfiltered = (raw[0], raw[1]) if progress.converged else None
    averages = []
    for (data, weight), mine, other in zip(sums, low, low[::-1], strict=True):
        m_step.join_low_resolution_(data, weight, mine, other, pad, shared_shell)
        averages.append(m_step.averages(data.to(where), weight.to(where), pad))
    fsc = m_step.fsc_of_averages(averages[0], averages[1], box)
    if p.solvent_correct_fsc and job.mask is not None:
        fsc = solvent_corrected(raw, job.mask, progress.size, job.engine.seed + progress.iteration)
    updated = [update(job, model, s, state.particles, h, cc) for h, (model, s) in enumerate(zip(models, statistics, strict=True), 1)]
    progress = replace(progress, ave_pmax=updated[0].ave_pmax)
    joined = None
    if progress.converged:
        (data, weight), (data2, weight2) = sums
        joined = new_map(job, updated[0], (data + data2).to(where), (weight + weight2).to(where), fsc, cc, joined=True)
        ssnr = joined.data_vs_prior[0]
    maps = [new_map(job, model, d.to(where), w.to(where), fsc, cc, joined=False) for model, (d, w) in zip(updated, sums, strict=True)]
    if joined is None:
        ssnr = maps[0].data_vs_prior[0]
    initial_shell = lowpass_shell(box, pixel_size, p.initial_lowpass) if cc else None
    progress = after_maximization(progress, fsc, ssnr, box, pixel_size, initial_shell)
    return replace(state, progress=progress, models=(maps[0], maps[1]), joined=joined, unfiltered=unfiltered)


def solvent_corrected(raw: list[Tensor], mask: Tensor, size: int, seed: int) -> Tensor:
    """Mask-corrected FSC of unregularised halves, zero beyond the window (spec 3.7)."""
    curve = corrected_fsc(raw[0], raw[1], mask.to(raw[0]), seed=seed).corrected.clone()
    curve[size // 2 + 1 :] = 0
    return curve


def update(job: Job, model: Model, statistics: Statistics, particles: Particles, half: int, cc: bool) -> Model:
    """Noise, scales, norm and priors of one half."""
    per_micrograph = torch.bincount(particles.micrograph[particles.half == half], minlength=len(particles.micrographs)).double()
    boxes = [o.box for o in particles.optics]
    return m_step.update_parameters(model, statistics, boxes, per_micrograph, cc=cc, norm=job.params.norm, scale=job.params.scale)


def new_map(job: Job, model: Model, data: Tensor, weight: Tensor, fsc: Tensor, cc: bool, *, joined: bool) -> Model:
    """The model with the map reconstructed from its sums and the spectra that go with it. `data` is used up."""
    p, box = job.params, model.box
    sigma2_map = m_step.map_variance(weight, p.pad, box)
    tau2, ssnr = m_step.gold_standard_spectra(fsc, sigma2_map, p.tau_fudge, joined)
    density, coverage = m_step.reconstruct(data, weight, tau2, p.pad, box, job.engine.dtype)
    if cc:
        density = lowpass_map(density, model.pixel_size, p.initial_lowpass)
        keep = lowpass_weights(torch.arange(box // 2 + 1, dtype=torch.float64), box, model.pixel_size, p.initial_lowpass).square()
        tau2, ssnr = tau2 * keep, ssnr * keep
    if p.flatten_solvent and not joined:
        density = m_step.flatten_solvent(density, model.pixel_size, p.diameter, p.mask_edge, job.mask, job.mask2)
    return replace(
        model,
        maps=density[None].cpu(),
        tau2=tau2[None],
        data_vs_prior=ssnr[None],
        fsc=fsc,
        sigma2_map=sigma2_map[None],
        coverage=coverage[None],
    )
