"""The E-step: posterior of every orientation and shift for every particle, and the sums the M-step needs (spec/refinement 2, 3.1, 3.8).

All particles of a half and an optics group are compared with one grid (search.py); the sums over the significant samples are
made in slice space, and each orientation is inserted once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.ops.accumulate import accumulate
from frazil.ops.compare import significant
from frazil.ops.insert import insert_
from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.planner import Shape, half_volume_elements, make_plan
from frazil.refine.posterior import Posterior, posterior, weighted_rows
from frazil.refine.sampling import Grid
from frazil.refine.search import (
    Fine,
    Found,
    Group,
    Pass,
    centre_of,
    coarse_global,
    coarse_local,
    fine_pass,
    in_order,
    make_group,
    make_pass,
    make_slices,
    old_offset,
    rescored,
)
from frazil.refine.timing import Clock
from frazil.refine.windows import Engine, Frame, Windows, make_frame, windows_in_parts

log = logging.getLogger("frazil.refine")


@dataclass
class Sums:
    """Running sums of one E-step, on its device; `finish` makes Statistics of them. The one mutable record of the engine."""

    data: Tensor
    weight: Tensor
    sigma2: list[Tensor]
    sigma2_weight: Tensor
    direction: Tensor
    offset_sum: Tensor
    offset2: Tensor
    scale_cross: Tensor
    scale_power: Tensor

    def finish(self, poses: Poses) -> Statistics:
        """The sums of all batches; those over particles from their poses."""
        return Statistics(
            self.data, self.weight, tuple(s.cpu() for s in self.sigma2), self.sigma2_weight.cpu(), self.direction.cpu(),
            float(self.offset2), self.offset_sum.cpu(), self.scale_cross.cpu(), self.scale_power.cpu(), float(poses.norm.sum()),
            float(poses.log_likelihood.sum()), float(poses.pmax.sum()), len(poses.norm),
        )  # fmt: skip


def new_sums(step: Pass, optics: tuple, micrographs: int, dtype: torch.dtype) -> Sums:
    """Zero sums; the volumes in `dtype` (real) and its complex counterpart."""
    f, at, k = torch.float64, step.engine.device, len(step.volumes)
    shape = (k, *step.volumes[0].shape)
    return Sums(
        data=torch.zeros(shape, dtype=torch.complex128 if dtype == f else torch.complex64, device=at),
        weight=torch.zeros(shape, dtype=dtype, device=at),
        sigma2=[torch.zeros(o.box // 2 + 1, dtype=f, device=at) for o in optics],
        sigma2_weight=torch.zeros(len(optics), dtype=f, device=at),
        direction=torch.zeros(k, step.grid.directions, dtype=f, device=at),
        offset_sum=torch.zeros(k, 2, dtype=f, device=at),
        offset2=torch.zeros((), dtype=f, device=at),
        scale_cross=torch.zeros(micrographs, dtype=f, device=at),
        scale_power=torch.zeros(micrographs, dtype=f, device=at),
    )


@dataclass(frozen=True)
class Given:
    """What an E-step need not find or make."""

    assigned: Tensor | None = None  # (n,) int64: the only class each particle may belong to, −1: any (spec 2.3)
    volumes: Tensor | None = None  # `reference_volumes` of the model for the window n_c


def expectation(
    images: Images,
    particles: Particles,
    model: Model,
    grid: Grid,
    engine: Engine,
    sizes: tuple[int, int],
    *,
    given: Given | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Statistics, Poses, dict[str, float]]:
    """One E-step over all of `particles` (one half set, or all).

    images[i] are the pixels of particle i; sizes = (n_c, n_0), window sides of the fine and the coarse pass.
    `tick` is called with the number of particles done after every batch and may raise to stop.
    Returns the sums, the poses in the order of `particles`, and seconds by phase.
    """
    clock = Clock(engine.device, engine.timed)
    # All columns go to the device at once: a copy a batch would make the host wait for what is queued before it.
    table, model = particles.to(engine.device), replace(model, scales=model.scales.to(engine.device))
    given = given or Given()
    volumes = 20 * model.classes * half_volume_elements(model.box, sizes[0], engine.pad, model.maps.ndim == 3)  # bytes, sums too
    if engine.device != "cpu" and 2 * volumes > engine.budget:
        torch.cuda.empty_cache()  # so that volumes and sums do not take parts of larger blocks, whose rests no one could use
    step = make_pass(model, grid, engine, sizes, clock, given.volumes)
    poses = Poses.empty(len(particles), engine.device)
    sums: Sums | None = None
    done, found = 0, torch.zeros((), dtype=torch.int64, device=engine.device)
    for g, optics in enumerate(particles.optics):
        members = torch.nonzero(particles.group == g)[:, 0]
        if len(members) == 0:
            continue
        frame = make_frame(optics, sizes[0], model.box, model.pixel_size, engine)
        plan = make_plan(shape_of(step, frame), engine.budget, engine.shrink)
        group = make_group(step, g, frame, plan)
        sums = sums or new_sums(step, particles.optics, len(particles.micrographs), plan.sum_dtype)
        for index, at, only in batches(members, given.assigned, plan.images, engine.device):
            with clock("windows"):
                windows = windows_in_parts(images, table, (index, at), frame, model, engine, g, plan.window_images)
                batch = make_batch(step, group, table, at, windows)
            found += run_batch(step, group, batch, only, sums, poses)
            done += len(index)
            tick(done)
    assert sums is not None, "no particles in any optics group"
    poses = poses.to("cpu")
    if lost := done - int(found):
        log.warning("%d particles have no orientation of finite likelihood and keep their old one, with no weight", lost)
    return sums.finish(poses), poses, clock.seconds


def batches(members: Tensor, assigned: Tensor | None, most: int, device: str) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """(indices, the same on the device, the only class they may belong to or None) of at most so many particles; assigned −1: any class.

    All indices go to the device at once: a copy a batch would make the host wait for what is queued before it.
    """
    for k in [-1] if assigned is None else assigned[members].unique().tolist():
        some = members if assigned is None else members[assigned[members] == k]
        for index, at in zip(some.split(most), some.to(device).split(most), strict=True):
            yield index, at, None if k < 0 else k


def shape_of(step: Pass, frame: Frame) -> Shape:
    """What the planner needs to know of an E-step."""
    grid, engine, model = step.grid, step.engine, step.model
    return Shape(
        box=max(model.box, frame.optics.box), size=step.size, pad=engine.pad, classes=model.classes, pixels=frame.inside,
        shifts=len(grid.shifts) * grid.shift_children, children=grid.children * grid.shift_children,
        real=4 if engine.dtype == torch.float32 else 8, on_gpu=engine.device != "cpu", flat=model.maps.ndim == 3,
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Particles in work: images and gains weighted by the noise, and where their shifts start from."""

    particles: Particles  # on the device
    index: Tensor  # (b,) rows of particles, on the device
    windows: Windows
    y: Tensor  # (b, p) complex s c X/σ²
    q: Tensor  # (b, p) s²c²/(2σ²)
    old: Tensor  # (b, 2) Å on the device: search.old_offset

    def __getitem__(self, part: slice) -> Batch:
        windows = Windows(**{name: value[part] for name, value in vars(self.windows).items()})
        return replace(self, index=self.index[part], windows=windows, y=self.y[part], q=self.q[part], old=self.old[part])

    def __len__(self) -> int:
        return len(self.index)


def make_batch(step: Pass, group: Group, particles: Particles, index: Tensor, windows: Windows) -> Batch:
    """What both passes compare with the slices."""
    old = old_offset(step, particles, index, windows, group.frame.optics.pixel_size)
    y, q = windows.masked * (windows.gain * group.likelihood), 0.5 * windows.gain.square() * group.likelihood
    return Batch(particles, index, windows, y, q, old)


def run_batch(step: Pass, group: Group, batch: Batch, only: int | None, sums: Sums, poses: Poses) -> Tensor:
    """Both passes and the sums for a batch of particles; returns () int64, on the device, how many of them found any sample."""
    engine, grid, index = step.engine, step.grid, batch.index
    if grid.sampling.sigma is None and grid.rotations is None:
        coarse, left_out = coarse_global(step, group, batch.y, batch.q, batch.old, only)
        if engine.cc:
            coarse, log_orientation = in_order(coarse, torch.zeros_like(coarse.value), len(index))
        else:
            with step.clock("coarse products"):
                coarse, log_orientation = rescored(step, group, coarse, batch.y, batch.q, batch.old)
    else:
        coarse, log_orientation = coarse_local(step, group, batch.particles, index, batch.y, batch.q, batch.old, only)
        coarse, log_orientation = in_order(coarse, log_orientation, len(index))
        left_out = None
    with step.clock("thresholds"):
        if step.engine.cc:
            log_orientation = torch.zeros_like(log_orientation)
        else:
            keep = significant(coarse.image, coarse.value, len(index), engine.fraction, engine.max_significant, left_out).keep
            keep = torch.nonzero(keep)[:, 0]
            coarse, log_orientation = coarse[keep], log_orientation[keep]
    parts = sub_batches(coarse, len(index), group.plan.entries)
    found = torch.zeros((), dtype=torch.int64, device=index.device)
    for lo, hi in parts:
        some, prior = coarse, log_orientation
        if len(parts) > 1:
            mine = torch.nonzero((coarse.image >= lo) & (coarse.image < hi))[:, 0]
            some, prior = coarse[mine], log_orientation[mine]
            some = Found(some.image - lo, some.orientation, some.shift, some.value)
        part, any_sample = fine_batch(step, group, some, prior, batch[lo:hi], sums)
        poses.put_(index[lo:hi], part)
        found += any_sample.sum()
    return found


def sub_batches(coarse: Found, images: int, entries: int) -> list[tuple[int, int]]:
    """Ranges of images with at most so many significant coarse samples (one image at least)."""
    if len(coarse.image) <= entries:
        return [(0, images)]
    ends = torch.bincount(coarse.image, minlength=images).cumsum(0).tolist()
    out, lo, base = [], 0, 0
    for i in range(images):
        if ends[i] - base > entries and i > lo:
            out.append((lo, i))
            lo, base = i, ends[i - 1]
    return [*out, (lo, images)]


def fine_batch(step: Pass, group: Group, coarse: Found, log_orientation: Tensor, batch: Batch, sums: Sums) -> tuple[Poses, Tensor]:
    """Pass 2 and the sums of some images. Adds to `sums`; returns their poses, and (b,) bool which images have a sample."""
    fine = fine_pass(step, group, coarse, log_orientation, batch.y, batch.q, batch.old)
    with step.clock("posterior"):
        post = posterior(step, fine, len(batch))
    per_image = add_samples(step, group, fine, post.gamma, batch, sums)
    with step.clock("statistics"):
        residual = add_statistics(step, group, fine, post.gamma, per_image, batch, sums)
        return best_poses(step, group, fine, post, coarse, residual, batch)


def best_poses(
    step: Pass, group: Group, fine: Fine, post: Posterior, coarse: Found, residual: Tensor, batch: Batch
) -> tuple[Poses, Tensor]:
    """The best sample of each image, and (b,) bool whether it has any.

    One without any (all excluded, or its likelihoods not finite) keeps what it had (spec 2.7).
    """
    grid, n, particles, index = step.grid, len(batch), batch.particles, batch.index
    some = post.best >= 0
    best = post.best.clamp(min=0)
    entry, rest = best // (grid.children * grid.shift_children), best % (grid.children * grid.shift_children)
    child, small = rest // grid.shift_children, rest % grid.shift_children
    norm = particles.norm[index]
    if step.engine.correct_norm:
        norm = torch.where(some, norm / step.model.norm_average * (2 * residual.clamp(min=0)).sqrt(), norm)
    old_rotation, old_shift = particles.rotation[index], particles.shift[index]
    if len(fine.image):
        orientation = fine.slices.orientation[:: grid.children][fine.orientation[entry]]
        shift = batch.windows.pre_shift.to(norm) + group.fine_shifts[fine.shift[entry] * grid.shift_children + small]
        rotation = grid.fine_rotations(orientation % grid.orientations, child)
        klass = orientation // grid.orientations
    else:
        rotation, shift, klass = old_rotation, old_shift, torch.zeros_like(best)
    found = Poses(
        torch.where(some[:, None, None], rotation, old_rotation), torch.where(some[:, None], shift, old_shift),
        torch.where(some, klass, particles.klass[index].sub(1).clamp(min=0)), norm, post.pmax,
        torch.zeros(n, dtype=torch.int64, device=norm.device).index_add_(0, coarse.image, torch.ones_like(coarse.image)),
        torch.where(some, log_likelihood(step, group, batch, post.log_norm), 0.0),
    )  # fmt: skip
    return found, some


def add_samples(step: Pass, group: Group, fine: Fine, gamma: Tensor, batch: Batch, sums: Sums) -> Tensor:
    """Weighted sums of the significant samples, inserted.

    Returns (b, 4) float64 an image: Σ x, Σ |S|²G (ops.accumulate), and both over the shells that measure the scale.
    """
    engine, w, frame, phases = step.engine, batch.windows, group.frame, group.fine_phases
    shell, n_shells = frame.pixels.shell[: frame.inside], frame.pixels.size // 2 + 1
    arrays = (w.masked * w.gain, w.gain.square(), w.unmasked * (w.data_gain * group.inverse), w.weight_gain * group.inverse)
    measuring, one = scale_pixels(step, frame), len(step.volumes) == 1
    if not len(fine.image):  # no image of the batch has a finite likelihood
        return torch.zeros(len(batch), 4, dtype=torch.float64, device=gamma.device)
    with step.clock("sums"):
        slices, row_slice, row_image, weights = weighted_rows(fine, gamma, len(batch), phases.shape[1])
    per_image = torch.zeros(len(batch), 4, dtype=torch.float64, device=gamma.device)
    into = (sums.data[0], sums.weight[0]) if one else (sums.data, sums.weight)
    for a, b, lo, hi in slices.chunks(row_slice, group.plan):
        with step.clock("sums"):
            some = make_slices(step, slices, a, b, frame.coords)
            part = accumulate(
                some.values, row_slice[lo:hi] - a, row_image[lo:hi], weights[lo:hi], phases, *arrays, shell, n_shells, measuring,
                slice_class=some.klass, implementation=engine.implementation,
            )  # fmt: skip
            data = part.data - part.weight * some.values if engine.residual else part.data
            sums.sigma2[group.number][:n_shells] += part.power - 2 * part.cross
            per_image.index_add_(0, row_image[lo:hi], part.rows.double())
        with step.clock("insertion"):
            insert_(
                *into, data, part.weight, some.rotations, frame.coords, engine.pad, which=some.which, implementation=engine.implementation
            )
    return per_image


def scale_pixels(step: Pass, frame: Frame) -> Tensor:
    """(K, p) bool: pixels of the shells whose data-versus-prior exceeds 3, over which scales are measured (spec 1.6)."""
    shell = (frame.pixels.shell[: frame.inside].double() / frame.scale + 0.5).long()
    good = (step.model.data_vs_prior > 3).to(shell.device)
    return good[:, shell.clamp(max=good.shape[1] - 1)]


def add_statistics(step: Pass, group: Group, fine: Fine, gamma: Tensor, per_image: Tensor, batch: Batch, sums: Sums) -> Tensor:
    """Noise, priors, offsets and scales (spec 3.8); returns (b,) float64 residual power S_i for the norm correction."""
    grid, n, w, g, particles, at = step.grid, len(batch), batch.windows, group.number, batch.particles, gamma.device
    by_shift = gamma.sum(1, dtype=torch.float64)  # (entries, c)
    each_entry = by_shift.sum(1)
    total = torch.zeros(n, dtype=torch.float64, device=at).index_add_(0, fine.image, each_entry)
    n_shells = w.window_power.shape[1]
    beyond = w.power[:, n_shells:]
    lost = (total == 0)[:, None]  # perhaps because their pixels are not numbers
    # The window's last shell lacks the pixels at ky = −n_c/2; the model is zero there, so whole shells are exact. RELION sums the window.
    power = w.window_power if step.engine.relion_form else w.power[:, :n_shells]
    sums.sigma2[g][:n_shells] += (power * total[:, None]).masked_fill(lost, 0).sum(0)
    sums.sigma2[g][n_shells:] += beyond.masked_fill(lost, 0).sum(0)
    sums.sigma2_weight[g] += total.sum()
    orientation = fine.slices.orientation[:: grid.children][fine.orientation]
    klass = orientation // grid.orientations
    sums.direction.view(-1).index_add_(0, klass * grid.directions + orientation % grid.orientations // grid.n_psi, each_entry)
    shifts = group.fine_shifts.view(-1, grid.shift_children, 2)
    total_shift = w.pre_shift[fine.image, None] + shifts[fine.shift]  # (entries, c, 2)
    centre = centre_of(step, klass).expand(len(klass), 2)
    if particles.prior_shift is not None and len(step.offset) == 1:
        centre = particles.prior_shift[batch.index][fine.image]
    sums.offset2 += (by_shift * (total_shift - centre[:, None]).square().sum(-1)).sum()
    sums.offset_sum.index_add_(0, klass, (by_shift[..., None] * total_shift).sum(1))
    micrograph = particles.micrograph[batch.index]
    s = step.model.scales[micrograph].clamp(min=0.001)
    sums.scale_cross.index_add_(0, micrograph, per_image[:, 2] / s)
    sums.scale_power.index_add_(0, micrograph, per_image[:, 3] / s**2)
    inside = power.sum(1) * total - 2 * per_image[:, 0] + per_image[:, 1]
    return inside + beyond.sum(1)


def log_likelihood(step: Pass, group: Group, batch: Batch, log_norm: Tensor) -> Tensor:
    """(b,) float64 log Σ w with the terms common to all hypotheses: −½ Σ|X|²/σ² − Σ log 2πσ² over the window's pixels."""
    if step.engine.cc:
        return log_norm.double()
    power = batch.windows.window_power
    sigma2 = step.model.sigma2[group.number].to(power)[1 : power.shape[1]]
    count = group.frame.window_start.diff()[1:].to(sigma2)
    constant = (count * torch.log(2 * math.pi * sigma2)).sum()
    return log_norm.double() - 0.5 * (power[:, 1:] / sigma2).sum(1) - constant
