"""Searching orientations and shifts: two passes of adaptive oversampling as matrix products (spec/refinement 2.5, 2.6, 10).

coarse   every orientation of every class and coarse shift in the window n_0 (dense), or the neighbours of a prior (rows);
fine     the 8^q × 4^q children of the significant samples in the window n_c, as rows (slice, image) against shared shift phases.

A *row* compares one slice with one image at all shifts; rows are sorted by slice, so that a slice is made once for all its images.
An orientation is counted through all classes: o + class · orientations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.fourier import padded_ft
from frazil.maths.gridding import sinc2
from frazil.ops.compare import candidates, compare
from frazil.ops.project import project
from frazil.ops.score import score
from frazil.refine.model import Model
from frazil.refine.planes import reference_planes
from frazil.refine.planner import Plan
from frazil.refine.sampling import Grid, neighbours
from frazil.refine.timing import Clock
from frazil.refine.windows import Engine, Frame, Windows

MARGIN = 1000.0  # the list of the coarse pass lacks this much less of the posterior than may be dropped
SPARE = 1.25  # times max_significant samples an image, at least, are listed by the coarse pass where that many matter
DEPTH = 26.0  # nats below the best: e⁻²⁶ × 10⁶ samples is far under the mass 1 − 0.999 that may be dropped


@dataclass(frozen=True)
class Pass:
    """What one E-step works with: a model, its transforms, a grid, the windows' sizes."""

    model: Model
    volumes: Tensor  # (K, …) half volumes (2D: half planes) of the references
    grid: Grid  # on the engine's device
    engine: Engine
    size: int  # n_c
    coarse_size: int  # n_0
    clock: Clock
    log_direction: Tensor  # (K, directions) log of the prior, on the device
    offset: Tensor  # (K or 1, 2) Å: centre of the shift prior of each class


@dataclass(frozen=True)
class Group:
    """What an optics group adds to a pass: the same for all of its particles."""

    number: int
    frame: Frame
    plan: Plan
    coarse_phases: Tensor  # (p_0, t)
    fine_phases: Tensor  # (p, t·4^q)
    fine_shifts: Tensor  # (t·4^q, 2) float64 Å
    inverse: Tensor  # (p,) 1/σ²
    likelihood: Tensor  # (p,) the same, 0 at r = 0 (in the cross-correlation mode 1)
    half: Tensor  # (h,) coarse orientations with psi < 180°: the others are their conjugates
    coarse: Tensor | None  # (K·h, p_0) slices of all classes, where memory holds them


@dataclass(frozen=True)
class Found:
    """Samples found by a pass: image (in the batch), orientation + class · orientations, shift index, value."""

    image: Tensor
    orientation: Tensor
    shift: Tensor
    value: Tensor

    def __getitem__(self, keep: Tensor) -> Found:
        if keep.dtype == torch.bool:  # once for all four: it makes the host wait
            keep = torch.nonzero(keep)[:, 0]
        return Found(self.image[keep], self.orientation[keep], self.shift[keep], self.value[keep])


def reference_volumes(model: Model, size: int, engine: Engine) -> Tensor:
    """(K, …) half volumes of the references, divided by the interpolation's sinc² before padding (spec 3.5)."""
    if model.maps.ndim == 3:
        return reference_planes(model.maps, size, engine)
    correction = sinc2(model.box, engine.pad, device=engine.device, dtype=engine.dtype)
    made = (padded_ft(volume.to(correction) / correction, engine.pad, size // 2) for volume in model.maps)
    first = next(made)[None]
    if len(model.maps) == 1:
        return first
    out = first.new_empty(len(model.maps), *first.shape[1:])  # filled one by one: a stack would hold all of them twice
    out[0] = first[0]
    for k, volume in enumerate(made, 1):
        out[k] = volume
    return out


def make_pass(model: Model, grid: Grid, engine: Engine, sizes: tuple[int, int], clock: Clock, volumes: Tensor | None = None) -> Pass:
    """A pass over a grid with a model; transforms the references, unless their transforms are given."""
    if volumes is None:
        with clock("reference"):
            volumes = reference_volumes(model, sizes[0], engine)
    offset = torch.zeros(1, 2, dtype=torch.float64) if model.prior_offset is None else model.prior_offset
    prior = model.pdf_direction if grid.rotations is None else model.pdf_class[:, None]
    if grid.sampling.sigma is not None:
        prior = model.pdf_class[:, None].expand(-1, grid.directions)
    log_direction = prior.log().to(device=engine.device, dtype=engine.dtype)
    return Pass(model, volumes, grid.to(engine.device), engine, *sizes, clock, log_direction, offset.to(engine.device))


def make_group(step: Pass, number: int, frame: Frame, plan: Plan) -> Group:
    """The part of a pass that particles of one optics group share."""
    engine, grid = step.engine, step.grid
    p = frame.coarse_inside(step.coarse_size)
    inverse = 1.0 / step.model.sigma2[number].to(engine.device)[frame.pixels.shell[: frame.inside]]
    likelihood = torch.ones_like(inverse) if step.engine.cc else inverse.clone()
    likelihood[0].fill_(0)  # r = 0 says nothing (spec 1.1); an assignment would make the host wait for a GPU
    fine_shifts = grid.fine_shifts().to(engine.device)
    group = Group(
        number=number,
        frame=frame,
        plan=plan,
        coarse_phases=shift_phases(frame, grid.coarse_shifts(), p, engine),
        fine_phases=shift_phases(frame, fine_shifts, frame.inside, engine),
        fine_shifts=fine_shifts,
        inverse=inverse.to(engine.dtype),
        likelihood=likelihood.to(engine.dtype),
        half=grid.first_half().to(engine.device),
        coarse=None,
    )
    searched = grid.sampling.sigma is None and grid.rotations is None
    count = len(group.half) * step.model.classes
    if searched and count * p * (8 if engine.dtype == torch.float32 else 16) <= plan.working // 4:
        with step.clock("coarse slices"):
            group = replace(group, coarse=coarse_slices(step, group, 0, count))
    return group


def coarse_slices(step: Pass, group: Group, a: int, b: int) -> Tensor:
    """(b − a, p_0) slices of the coarse orientations with psi < 180°, counted through the classes."""
    h, p, engine = len(group.half), len(group.coarse_phases), step.engine
    number = torch.arange(a, b, device=engine.device)
    rotations = step.grid.coarse_rotations(group.half[number % h]).to(engine.dtype)
    one = len(step.volumes) == 1
    return project(
        step.volumes[0] if one else step.volumes, rotations, group.frame.coords[:p], engine.pad, which=None if one else number // h,
        implementation=engine.implementation,
    )  # fmt: skip


def shift_phases(frame: Frame, shifts: Tensor, p: int, engine: Engine) -> Tensor:
    """(p, t) complex exp(−2πi k·t): multiplies an image's transform to move it by t Å (t, 2)."""
    angle = -2 * math.pi * frame.k[:p] @ shifts.to(frame.k.device).T
    return torch.polar(torch.ones_like(angle), angle).to(engine.complex)


def old_offset(step: Pass, particles: Particles, index: Tensor, windows: Windows, pixel_size: float) -> Tensor:
    """(b, 2) Å on the device: what the grid's unperturbed shifts are added to before the shift prior is evaluated (spec 2.5)."""
    if step.engine.relion_form:  # RELION ≥ 3.1 adds the old offset in px to the grid in Å and multiplies by a²
        return windows.pre_shift_px.to(step.offset)
    if particles.prior_shift is not None:
        return (windows.pre_shift - particles.prior_shift[index]).to(step.offset)
    return windows.pre_shift.to(step.offset)


def shift_prior(step: Pass, old: Tensor, shifts: Tensor, centre: Tensor, pixel_size: float) -> Tensor:
    """log of the Gaussian prior of coarse, unperturbed shifts (…, 2) Å around a centre (…, 2), broadcast over the arguments (spec 2.5)."""
    unit = pixel_size if step.engine.relion_form else 1.0
    return -((old + shifts) * unit - centre).square().sum(-1) / (2 * step.model.sigma_offset**2)


def centre_of(step: Pass, klass: Tensor) -> Tensor:
    """(…, 2) Å: centre of the shift prior of classes (…)."""
    return step.offset[klass] if len(step.offset) > 1 else step.offset[0]


def coarse_global(step: Pass, group: Group, y: Tensor, q: Tensor, old: Tensor, only: int | None) -> tuple[Found, Tensor]:
    """Candidates of the whole coarse grid of all classes (or one), pass 1, and the mass an image's list lacks, relative to its best.

    psi + 180° comes free as the conjugate. Where the slices of all do not fit the memory they are taken in chunks. Samples that cannot
    be significant are left out at once. The products may be in TF32 or bfloat16, so the values only say what is worth scoring again
    (`rescored`), and the list is longer than needed: it lacks 1/MARGIN of the mass that may be dropped. That mass is known to some
    per cent only, and differently on a CPU and on a GPU: were it larger it would decide which marginal samples count (docs/precision.md).
    """
    grid, engine, a = step.grid, step.engine, group.frame.optics.pixel_size
    h, p = len(group.half), len(group.coarse_phases)
    classes = range(step.model.classes) if only is None else range(only, only + 1)
    y, q, phases = y[:, :p], q[:, :p], group.coarse_phases
    shared = shift_prior(step, old[:, None], grid.shifts, step.offset[0] if len(step.offset) == 1 else torch.zeros_like(old[0]), a).to(q)
    y, q, phases = with_class_offsets(step, y, q, phases, old, a)
    found, best, left_out = [], [], []
    most = int(SPARE * engine.max_significant) + 1 if engine.max_significant >= 0 else None
    for first, some in coarse_parts(step, group, classes):
        with step.clock("coarse products"):
            flat = torch.arange(first, first + len(some), device=old.device)
            klass, o = flat // h, group.half[flat % h]
            prior = step.log_direction[klass, o // grid.n_psi]
            if len(step.offset) > 1:
                prior = prior - (step.offset[klass].square().sum(-1) / (2 * step.model.sigma_offset**2)).to(prior)
                some = torch.cat([some, step.offset[klass].to(some).repeat(1, 2)], 1)
            c = candidates(
                some, y, q, phases, prior.expand(2, -1).contiguous(), shared, depth=DEPTH, fraction=1 - (1 - engine.fraction) / MARGIN,
                most=most, cc=step.engine.cc, batch=group.plan.score_images(len(some), len(grid.shifts)),
                implementation=engine.implementation,
            )  # fmt: skip
            mate, which = c.hypothesis // len(some), c.hypothesis % len(some)
            orientation = o[which] + mate * (grid.n_psi // 2) + klass[which] * grid.orientations
            found.append(Found(c.image, orientation, c.shift, c.value))
            best.append(c.best)
            left_out.append(c.left_out)
    top = torch.stack(best)
    relative = (top - top.amax(0)).double().exp().nan_to_num(0)  # an image all of whose samples are excluded: −inf − −inf
    return _near_best(_join(found), len(y), step.engine.cc), (torch.stack(left_out) * relative).sum(0)


def rescored(step: Pass, group: Group, found: Found, y: Tensor, q: Tensor, old: Tensor) -> tuple[Found, Tensor]:
    """Samples of the coarse pass with their values in full precision, and the logs of their orientation priors; sorted (in_order).

    Which samples are significant then depends on rounding at 1e-6 only: refinements on a CPU and on a GPU stay together (CONVENTIONS).
    """
    engine, grid, p = step.engine, step.grid, len(group.coarse_phases)
    found = found[torch.argsort(found.orientation * len(y) + found.image, stable=True)]
    klass, o = found.orientation // grid.orientations, found.orientation % grid.orientations
    log_orientation = step.log_direction[klass, o // grid.n_psi]
    shift = shift_prior(step, old[found.image], grid.shifts[found.shift], centre_of(step, klass), group.frame.optics.pixel_size)
    prior = log_orientation + shift.to(log_orientation)
    distinct, number = torch.unique_consecutive(found.orientation, return_inverse=True)
    slices, value = Slices(distinct), torch.empty_like(prior)
    y, q = y[:, :p].contiguous(), q[:, :p].contiguous()
    for a, b, lo, hi in slices.chunks(number, group.plan):
        some = make_slices(step, slices, a, b, group.frame.coords[:p]).values
        value[lo:hi] = score(
            some, number[lo:hi] - a, found.image[lo:hi], found.shift[lo:hi], prior[lo:hi], y, q, group.coarse_phases, children=(1, 1),
            implementation=engine.implementation,
        )[:, 0, 0]  # fmt: skip
    return Found(found.image, found.orientation, found.shift, value), log_orientation


def coarse_parts(step: Pass, group: Group, classes: range) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, slices) of the coarse orientations with psi < 180°: all classes at once, or in chunks of one class."""
    h, p = len(group.half), len(group.coarse_phases)
    if group.coarse is not None:
        yield classes.start * h, group.coarse[classes.start * h : classes.stop * h]
        return
    chunk = max(step.grid.n_psi // 2, group.plan.working // 4 // (p * (8 if step.engine.dtype == torch.float32 else 16)))
    for k in classes:
        for lo in range(k * h, (k + 1) * h, chunk):
            with step.clock("coarse slices"):
                some = coarse_slices(step, group, lo, min(lo + chunk, (k + 1) * h))
            yield lo, some


def with_class_offsets(step: Pass, y: Tensor, q: Tensor, phases: Tensor, old: Tensor, pixel_size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, powers and phases with four pixels more, whose products with (c_x, c_y, c_x, c_y) of a class are o·c/σ².

    With |o − c|² = |o|² − 2 o·c + |c|², o = old + t, the part of the shift prior that depends on both class and shift becomes part
    of the matrix product. Real on both sides, so that the conjugate mate at psi + 180° has the same. Zeros in the cross-correlation
    mode, which has no priors; unchanged with one centre.
    """
    if len(step.offset) == 1:
        return y.contiguous(), q.contiguous(), phases
    unit = 0.0 if step.engine.cc else (pixel_size if step.engine.relion_form else 1.0) / step.model.sigma_offset**2
    t = step.grid.shifts.T * unit
    images = torch.cat([old * unit, torch.ones_like(old)], 1).to(y)
    turn = torch.cat([torch.ones_like(t), t]).to(phases)
    return torch.cat([y, images], 1), torch.cat([q, torch.zeros_like(images.real)], 1), torch.cat([phases, turn])


def _join(parts: list[Found]) -> Found:
    if len(parts) == 1:
        return parts[0]
    return Found(*(torch.cat([getattr(f, n) for f in parts]) for n in ("image", "orientation", "shift", "value")))


def _near_best(found: Found, images: int, only_best: bool) -> Found:
    """Drop samples more than DEPTH below the best of their image; with only_best keep one sample an image."""
    best = found.value.new_full((images,), -torch.inf).scatter_reduce(0, found.image, found.value, "amax")
    if not only_best:
        return found[found.value >= best[found.image] - DEPTH]
    at = torch.nonzero(found.value == best[found.image])[:, 0]
    first = torch.full((images,), len(found.value), dtype=torch.int64, device=at.device).scatter_reduce(0, found.image[at], at, "amin")
    return found[first[first < len(found.value)]]


@dataclass(frozen=True)
class Slices:
    """Slices to be made: coarse orientations (with the class: o + class · orientations), each alone or with all its children.

    Sorted by class and orientation; what is compared with them refers to them by number and is sorted by it.
    """

    orientation: Tensor  # (s,) int64
    child: Tensor | None = None  # (s,) int64: children of a coarse orientation, None: coarse orientations themselves

    def __len__(self) -> int:
        return len(self.orientation)

    def chunks(self, users: Tensor, plan: Plan, unit: int = 1) -> list[tuple[int, int, int, int]]:
        """(first slice, end slice, first user, end user) of chunks within the plan's slices and users.

        users: slice (or group of `unit` slices) of each user, non-decreasing; a single group may exceed the number of users.
        """
        groups, most = len(self) // unit, max(1, plan.slices // unit)
        if groups <= most and len(users) <= plan.users:
            return [(0, groups * unit, 0, len(users))] if groups else []
        ends = torch.bincount(users, minlength=groups).cumsum(0).cpu().numpy()
        out, a, lo = [], 0, 0
        while a < groups:
            b = min(a + most, groups, max(a + 1, int(np.searchsorted(ends, lo + plan.users, side="right"))))
            out.append((a * unit, b * unit, lo, int(ends[b - 1])))
            a, lo = b, int(ends[b - 1])
        return out

    def rotations(self, grid: Grid, a: int, b: int) -> Tensor:
        """(b − a, 3, 3) float64 rotations of slices a…b."""
        where = self.orientation[a:b] % grid.orientations
        return grid.coarse_rotations(where) if self.child is None else grid.fine_rotations(where, self.child[a:b])


@dataclass(frozen=True)
class Made:
    """Some slices."""

    values: Tensor  # (s, p) complex
    rotations: Tensor  # (s, 3, 3)
    klass: Tensor  # (s,) int64
    which: Tensor | None  # the same for ops.project and ops.insert_: None with one class


def make_slices(step: Pass, slices: Slices, a: int, b: int, coords: Tensor) -> Made:
    """Slices a…b on the device."""
    rotations = slices.rotations(step.grid, a, b).to(device=step.engine.device, dtype=step.engine.dtype)
    klass = slices.orientation[a:b] // step.grid.orientations
    which = klass if len(step.volumes) > 1 else None
    volumes = step.volumes if len(step.volumes) > 1 else step.volumes[0]
    values = project(volumes, rotations, coords, step.engine.pad, which=which, implementation=step.engine.implementation)
    return Made(values, rotations, klass, which)


@dataclass(frozen=True)
class Rows:
    """What each image is to be compared with, sorted by orientation."""

    slices: Slices
    slice: Tensor  # (r,) number of a row's slice
    image: Tensor  # (r,)
    log_prior: Tensor  # (r,)


def local_rows(step: Pass, particles: Particles, index: Tensor, only: int | None) -> Rows:
    """The coarse orientations near the prior rotation of each particle; on a fixed grid its own rotation."""
    engine, grid = step.engine, step.grid
    if grid.rotations is not None:
        image, o = torch.arange(len(index), device=engine.device), index
        log = torch.zeros(len(index), dtype=torch.float64, device=engine.device)
    else:
        centre = particles.prior_rotation if particles.prior_rotation is not None else particles.rotation
        near = neighbours(grid, centre[index], engine.relion_form)
        image, o, log = near.image, near.orientation, near.log_prior
    classes = torch.arange(step.model.classes, device=o.device) if only is None else torch.tensor([only], device=o.device)
    k = len(classes)
    o = o.repeat(k) + classes.repeat_interleave(len(o)) * grid.orientations
    log = log.repeat(k) + step.log_direction[classes, 0].to(log).repeat_interleave(len(log))
    unique, row_slice = torch.unique(o, return_inverse=True)
    order = torch.argsort(row_slice, stable=True)
    return Rows(Slices(unique), row_slice[order], image.repeat(k)[order], log[order].to(engine.dtype))


def coarse_local(
    step: Pass, group: Group, particles: Particles, index: Tensor, y: Tensor, q: Tensor, old: Tensor, only: int | None
) -> tuple[Found, Tensor]:
    """Every coarse sample near each particle's prior rotation that may be significant, pass 1; also their orientation priors."""
    engine, grid, p = step.engine, step.grid, len(group.coarse_phases)
    with step.clock("neighbours"):
        rows = local_rows(step, particles, index, only)
    y, q = y[:, :p].contiguous(), q[:, :p].contiguous()
    best = torch.full((len(y),), -torch.inf, dtype=engine.dtype, device=y.device)
    found = []
    for a, b, lo, hi in rows.slices.chunks(rows.slice, group.plan):
        image = rows.image[lo:hi]
        with step.clock("coarse slices"):
            some = make_slices(step, rows.slices, a, b, group.frame.coords[:p])
        with step.clock("coarse products"):
            value = compare(
                some.values, rows.slice[lo:hi] - a, image, y, q, group.coarse_phases, cc=engine.cc, implementation=engine.implementation
            )
        with step.clock("thresholds"):
            if not step.engine.cc:
                centre = centre_of(step, some.klass[rows.slice[lo:hi] - a]).expand(hi - lo, 2)[:, None]
                value += shift_prior(step, old[image, None], grid.shifts, centre, group.frame.optics.pixel_size).to(value)
                value += rows.log_prior[lo:hi, None]
            best.scatter_reduce_(0, image, value.amax(1), "amax")
            row, t = torch.nonzero(value >= (best[image] - DEPTH)[:, None], as_tuple=True)
            found.append(Found(image[row], row + lo, t, value[row, t]))
    near_best = _near_best(_join(found), len(y), step.engine.cc)
    row = near_best.orientation
    return Found(near_best.image, rows.slices.orientation[rows.slice[row]], near_best.shift, near_best.value), rows.log_prior[row]


@dataclass(frozen=True)
class Fine:
    """All children of significant coarse samples (entries, sorted by orientation, image and shift) and their log-posteriors."""

    slices: Slices  # the children of the distinct orientations
    orientation: Tensor  # (n,) number of an entry's orientation among the distinct ones
    image: Tensor  # (n,)
    shift: Tensor  # (n,) coarse
    value: Tensor  # (n, C, c) score + priors


def in_order(coarse: Found, log_orientation: Tensor, images: int) -> tuple[Found, Tensor]:
    """Samples and their orientation priors sorted by orientation and image."""
    order = torch.argsort(coarse.orientation * images + coarse.image, stable=True)
    return coarse[order], log_orientation[order]


def fine_pass(step: Pass, group: Group, coarse: Found, prior: Tensor, y: Tensor, q: Tensor, old: Tensor) -> Fine:
    """Pass 2: the children of significant coarse samples (sorted: in_order) with these orientation priors in the fine window."""
    grid, engine = step.grid, step.engine
    p = len(group.coarse_phases) if engine.strict else group.frame.inside
    y, q, coords, phases = y[:, :p], q[:, :p], group.frame.coords[:p], group.fine_phases[:p]
    with step.clock("thresholds"):
        distinct, orientation = torch.unique_consecutive(coarse.orientation, return_inverse=True)
        children = torch.arange(grid.children, device=distinct.device).repeat(len(distinct))
        slices = Slices(distinct.repeat_interleave(grid.children), children)
        if not step.engine.cc:  # no priors in that mode (spec 2.8)
            centre = centre_of(step, coarse.orientation // grid.orientations)
            prior = prior + shift_prior(
                step, old[coarse.image], grid.shifts[coarse.shift], centre, group.frame.optics.pixel_size
            ).to(prior)
        sizes = (grid.children, grid.shift_children)
        value = torch.empty(len(prior), *sizes, dtype=engine.dtype, device=prior.device)
    for a, b, lo, hi in slices.chunks(orientation, group.plan, unit=grid.children):
        with step.clock("fine slices"):
            some = make_slices(step, slices, a, b, coords).values
        with step.clock("fine products"):
            value[lo:hi] = score(
                some, orientation[lo:hi] - a // grid.children, coarse.image[lo:hi], coarse.shift[lo:hi], prior[lo:hi], y, q,
                phases, children=sizes, cc=step.engine.cc, implementation=engine.implementation,
            )  # fmt: skip
    return Fine(slices, orientation, coarse.image, coarse.shift, value)
