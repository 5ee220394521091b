"""The E-step: posterior of every orientation and shift for every particle, and the sums the M-step needs (spec/refinement 2, 3.1, 3.8).

All particles of a half and an optics group are compared with one grid (search.py); the sums over the significant samples are
made in slice space, and each orientation is inserted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.ops.accumulate import accumulate
from frazil.ops.compare import significant
from frazil.ops.insert import insert_
from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.planner import Plan, Shape, make_plan
from frazil.refine.posterior import posterior, weighted_rows
from frazil.refine.sampling import Grid
from frazil.refine.search import (
    Fine,
    Found,
    Pass,
    coarse_global,
    coarse_local,
    fine_pass,
    make_slices,
    reference_volumes,
    shift_phases,
    shift_prior,
)
from frazil.refine.timing import Clock
from frazil.refine.windows import Engine, Frame, Windows, make_frame, make_windows


@dataclass
class Sums:
    """Running sums of one E-step; `finish` makes Statistics of them. The one mutable record of the engine, local to `expectation`."""

    data: Tensor
    weight: Tensor
    sigma2: list[Tensor]
    sigma2_weight: Tensor
    direction: Tensor
    scale_cross: Tensor
    scale_power: Tensor
    offset2: float = 0.0
    norm: float = 0.0
    log_likelihood: float = 0.0
    pmax: float = 0.0
    particles: int = 0

    def finish(self) -> Statistics:
        return Statistics(
            self.data, self.weight, tuple(self.sigma2), self.sigma2_weight, self.direction, self.offset2,
            self.scale_cross, self.scale_power, self.norm, self.log_likelihood, self.pmax, self.particles,
        )  # fmt: skip


def new_sums(step: Pass, optics: tuple, micrographs: int, dtype: torch.dtype) -> Sums:
    """Zero sums; the volumes in `dtype` (real) and its complex counterpart."""
    shape, f = (len(step.volumes), *step.volumes[0].shape), torch.float64
    return Sums(
        data=torch.zeros(shape, dtype=torch.complex128 if dtype == f else torch.complex64, device=step.engine.device),
        weight=torch.zeros(shape, dtype=dtype, device=step.engine.device),
        sigma2=[torch.zeros(o.box // 2 + 1, dtype=f) for o in optics],
        sigma2_weight=torch.zeros(len(optics), dtype=f),
        direction=torch.zeros(len(step.volumes), step.grid.directions, dtype=f),
        scale_cross=torch.zeros(micrographs, dtype=f),
        scale_power=torch.zeros(micrographs, dtype=f),
    )


def expectation(
    images: Images,
    particles: Particles,
    model: Model,
    grid: Grid,
    engine: Engine,
    sizes: tuple[int, int],
    *,
    cc: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Statistics, Poses, dict[str, float]]:
    """One E-step over all of `particles` (one half set).

    images[i] are the pixels of particle i; sizes = (n_c, n_0), window sides of the fine and the coarse pass; cc: the cross-correlation
    mode of a first iteration (spec 2.8). `tick` is called with the number of particles done after every batch and may raise to stop.
    Returns the sums, the poses in the order of `particles`, and seconds by phase.
    """
    clock = Clock(engine.device)
    with clock("reference"):
        volumes = reference_volumes(model, sizes[0], engine)
    step = Pass(model, volumes, grid, engine, *sizes, cc, clock)
    poses = Poses.empty(len(particles))
    sums: Sums | None = None
    done = 0
    for g, optics in enumerate(particles.optics):
        members = torch.nonzero(particles.group == g)[:, 0]
        if len(members) == 0:
            continue
        frame = make_frame(optics, sizes[0], model.box, model.pixel_size, engine)
        plan = make_plan(shape_of(step, frame), engine.budget, engine.shrink)
        sums = sums or new_sums(step, particles.optics, len(particles.micrographs), plan.sum_dtype)
        for index in members.split(plan.images):
            with clock("windows"):
                windows = make_windows(images[index], particles, index, frame, model, engine, g)
            run_batch(step, frame, plan, make_batch(step, frame, particles, index, windows, g), sums, poses)
            done += len(index)
            tick(done)
    assert sums is not None, "no particles in any optics group"
    sums.norm = float(poses.norm.sum())
    sums.log_likelihood, sums.pmax = float(poses.log_likelihood.sum()), float(poses.pmax.sum())
    sums.particles = len(particles)
    return sums.finish(), poses, clock.seconds


def shape_of(step: Pass, frame: Frame) -> Shape:
    """What the planner needs to know of an E-step."""
    grid, engine, model = step.grid, step.engine, step.model
    return Shape(
        box=max(model.box, frame.optics.box), size=step.size, pad=engine.pad, classes=model.classes, pixels=frame.inside,
        shifts=len(grid.shifts) * grid.shift_children, children=grid.children * grid.shift_children,
        real=4 if engine.dtype == torch.float32 else 8, on_gpu=engine.device != "cpu",
    )  # fmt: skip


def make_batch(step: Pass, frame: Frame, particles: Particles, index: Tensor, windows: Windows, group: int) -> Batch:
    """What both passes compare with the slices: images and gains weighted by the noise, log-prior of the shifts."""
    engine, model = step.engine, step.model
    inverse = 1.0 / model.sigma2[group].to(engine.device)[frame.pixels.shell[: frame.inside]]
    likelihood = torch.ones_like(inverse) if step.cc else inverse.clone()
    likelihood[0] = 0.0  # r = 0 says nothing (spec 1.1)
    likelihood, inverse = likelihood.to(engine.dtype), inverse.to(engine.dtype)
    shift_log = shift_prior(step, particles, index, windows, frame.optics.pixel_size).to(device=engine.device, dtype=engine.dtype)
    if step.cc:  # no priors in this mode (spec 2.8)
        shift_log = torch.zeros_like(shift_log)
    y, q = windows.masked * (windows.gain * likelihood), 0.5 * windows.gain.square() * likelihood
    return Batch(particles, index, group, windows, y, q, shift_log, inverse)


def run_batch(step: Pass, frame: Frame, plan: Plan, batch: Batch, sums: Sums, poses: Poses) -> None:
    """Both passes and the sums for a batch of particles."""
    engine, particles, index = step.engine, batch.particles, batch.index
    y, q, shift_log = batch.y, batch.q, batch.shift_log
    if step.grid.sampling.sigma is None:
        coarse, left_out = coarse_global(step, frame, y, q, shift_log)
        log_orientation = (
            step.model.pdf_direction.log()
            .to(engine.device)[coarse.orientation // step.grid.orientations, coarse.orientation % step.grid.orientations // step.grid.n_psi]
            .to(engine.dtype)
        )
    else:
        centre = particles.prior_rotation if particles.prior_rotation is not None else particles.rotation
        coarse, log_orientation = coarse_local(step, frame, centre[index], y, q, shift_log, plan)
        left_out = None
    with step.clock("thresholds"):
        if step.cc:
            log_orientation = torch.zeros_like(log_orientation)
        else:
            keep = significant(coarse.image, coarse.value, len(index), engine.fraction, engine.max_significant, left_out).keep
            coarse, log_orientation = coarse[keep], log_orientation[keep]
    for lo, hi in sub_batches(coarse, len(index), plan.entries):
        mine = (coarse.image >= lo) & (coarse.image < hi)
        some = coarse[mine]
        some = Found(some.image - lo, some.orientation, some.shift, some.value)
        poses.put_(index[lo:hi], fine_batch(step, frame, plan, some, log_orientation[mine], batch[lo:hi], sums))


def sub_batches(coarse: Found, images: int, entries: int) -> list[tuple[int, int]]:
    """Ranges of images with at most so many significant coarse samples (one image at least)."""
    ends = torch.bincount(coarse.image, minlength=images).cumsum(0).tolist()
    out, lo, base = [], 0, 0
    for i in range(images):
        if ends[i] - base > entries and i > lo:
            out.append((lo, i))
            lo, base = i, ends[i - 1]
    return [*out, (lo, images)]


@dataclass(frozen=True)
class Batch:
    """Particles in work: what the fine pass and the sums need of them."""

    particles: Particles
    index: Tensor  # (b,) rows of particles
    group: int  # their optics group
    windows: Windows
    y: Tensor
    q: Tensor
    shift_log: Tensor
    inverse: Tensor  # (p,) 1/σ²

    def __getitem__(self, part: slice) -> Batch:
        windows = Windows(**{name: value[part] for name, value in vars(self.windows).items()})
        return replace(self, index=self.index[part], windows=windows, y=self.y[part], q=self.q[part], shift_log=self.shift_log[part])

    def __len__(self) -> int:
        return len(self.index)


def fine_batch(step: Pass, frame: Frame, plan: Plan, coarse: Found, log_orientation: Tensor, batch: Batch, sums: Sums) -> Poses:
    """Pass 2 and the sums of some images. Adds to `sums`; returns their poses (`significant` is left to the caller)."""
    grid, n, index = step.grid, len(batch), batch.index
    fine = fine_pass(step, frame, coarse, log_orientation, batch.y, batch.q, batch.shift_log, plan)
    with step.clock("posterior"):
        post = posterior(step, fine, n)
    with step.clock("sums"):
        per_image = add_samples(step, frame, plan, fine, post.gamma, batch, sums)
    with step.clock("statistics"):
        residual = add_statistics(step, frame, fine, post.gamma, per_image, batch, sums)
    size = grid.children * grid.shift_children
    entry, child, small = (
        x.cpu() for x in (post.best // size, post.best // grid.shift_children % grid.children, post.best % grid.shift_children)
    )
    orientation = fine.slices.orientation[fine.orientation.cpu()[entry] * grid.children]
    shift = batch.windows.pre_shift + grid.fine_shifts()[fine.shift.cpu()[entry] * grid.shift_children + small]
    norm = batch.particles.norm[index]
    if step.engine.correct_norm:
        norm = norm / step.model.norm_average * (2 * residual).sqrt()
    return Poses(
        grid.fine_rotations(orientation % grid.orientations, child), shift, orientation // grid.orientations, norm, post.pmax,
        torch.bincount(coarse.image, minlength=n), log_likelihood(step, frame, batch, post.log_norm),
    )  # fmt: skip


def add_samples(step: Pass, frame: Frame, plan: Plan, fine: Fine, gamma: Tensor, batch: Batch, sums: Sums) -> Tensor:
    """Weighted sums of the significant samples, inserted.

    Returns (b, 4) float64 an image: Σ x, Σ |S|²G (ops.accumulate), and both over the shells that measure the scale.
    """
    engine, grid, w = step.engine, step.grid, batch.windows
    phases = shift_phases(frame, grid.fine_shifts(), frame.inside, engine)
    shell, n_shells = frame.pixels.shell[: frame.inside], frame.pixels.size // 2 + 1
    arrays = (w.masked * w.gain, w.gain.square(), w.unmasked * (w.data_gain * batch.inverse), w.weight_gain * batch.inverse)
    slices, row_slice, row_image, weights = weighted_rows(fine, gamma, len(batch), phases.shape[1])
    per_image = torch.zeros(len(batch), 4, dtype=torch.float64, device=gamma.device)
    for a, b, lo, hi in slices.chunks(row_slice, plan, grid):
        k = int(slices.orientation[a]) // grid.orientations
        some, rotations = make_slices(step, slices, a, b, frame.coords)
        part = accumulate(
            some, row_slice[lo:hi] - a, row_image[lo:hi], weights[lo:hi], phases, *arrays, shell, n_shells, scale_pixels(step, frame, k),
            implementation=engine.implementation,
        )  # fmt: skip
        insert_(
            sums.data[k], sums.weight[k], part.data, part.weight, rotations, frame.coords, engine.pad, implementation=engine.implementation
        )
        sums.sigma2[batch.group][:n_shells] += (part.power - 2 * part.cross).cpu()
        per_image.index_add_(0, row_image[lo:hi], part.rows.double())
    return per_image


def scale_pixels(step: Pass, frame: Frame, k: int) -> Tensor:
    """(p,) bool: pixels of the shells whose data-versus-prior exceeds 3, over which scales are measured (spec 1.6)."""
    shell = (frame.pixels.shell[: frame.inside].double() / frame.scale + 0.5).long()
    good = (step.model.data_vs_prior[k] > 3).to(shell.device)
    return good[shell.clamp(max=len(good) - 1)]


def add_statistics(step: Pass, frame: Frame, fine: Fine, gamma: Tensor, per_image: Tensor, batch: Batch, sums: Sums) -> Tensor:
    """Noise, priors, offsets and scales (spec 3.8); returns (b,) float64 residual power S_i for the norm correction."""
    grid, n, w, group, particles = step.grid, len(batch), batch.windows, batch.group, batch.particles
    by_shift = gamma.sum(1, dtype=torch.float64)  # (entries, c)
    each_entry = by_shift.sum(1)
    total = torch.zeros(n, dtype=torch.float64, device=gamma.device).index_add_(0, fine.image, each_entry)
    n_shells = w.window_power.shape[1]
    beyond = w.power[:, n_shells:]
    # The window's last shell lacks the pixels at ky = −n_c/2; the model is zero there, so whole shells are exact. RELION sums the window.
    power = w.window_power if step.engine.relion_form else w.power[:, :n_shells]
    sums.sigma2[group][:n_shells] += (power * total[:, None]).sum(0).cpu()
    sums.sigma2[group][n_shells:] += beyond.sum(0).cpu()
    sums.sigma2_weight[group] += float(total.sum())
    orientation = fine.slices.orientation[:: grid.children][fine.orientation.cpu()]
    flat = orientation // grid.orientations * grid.directions + orientation % grid.orientations // grid.n_psi
    sums.direction.view(-1).index_add_(0, flat, each_entry.cpu())
    centre = torch.zeros(n, 2, dtype=torch.float64) if particles.prior_shift is None else particles.prior_shift[batch.index]
    shifts = grid.fine_shifts().reshape(-1, grid.shift_children, 2)
    moved = (w.pre_shift - centre)[fine.image.cpu(), None] + shifts[fine.shift.cpu()]
    sums.offset2 += float((by_shift.cpu() * moved.square().sum(-1)).sum())
    micrograph = particles.micrograph[batch.index]
    s = step.model.scales[micrograph].clamp(min=0.001)
    each = per_image.cpu()
    sums.scale_cross.index_add_(0, micrograph, each[:, 2] / s)
    sums.scale_power.index_add_(0, micrograph, each[:, 3] / s**2)
    inside = (power.sum(1) * total).cpu() - 2 * each[:, 0] + each[:, 1]
    return inside + beyond.sum(1).cpu()


def log_likelihood(step: Pass, frame: Frame, batch: Batch, log_norm: Tensor) -> Tensor:
    """(b,) float64 log Σ w with the terms common to all hypotheses: −½ Σ|X|²/σ² − Σ log 2πσ² over the window's pixels."""
    if step.cc:
        return log_norm.double().cpu()
    power = batch.windows.window_power
    sigma2 = step.model.sigma2[batch.group].to(power)[1 : power.shape[1]]
    count = torch.bincount(frame.pixels.shell, minlength=len(sigma2) + 1)[1:].to(sigma2)
    constant = (count * torch.log(2 * math.pi * sigma2)).sum()
    return (log_norm.double() - 0.5 * (power[:, 1:] / sigma2).sum(1) - constant).cpu()
