"""Searching orientations and shifts: two passes of adaptive oversampling as matrix products (spec/refinement 2.5, 2.6, 10).

coarse   every orientation and coarse shift in the window n_0 (dense), or the neighbours of a prior (rows);
fine     the 8^q × 4^q children of the significant samples in the window n_c, as rows (slice, image) against shared shift phases.

A *row* compares one slice with one image at all shifts; rows are sorted by slice, so that a slice is made once for all its images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.fourier import padded_ft
from frazil.maths.gridding import sinc2
from frazil.ops.compare import candidates, compare
from frazil.ops.project import project
from frazil.ops.score import score
from frazil.refine.model import Model
from frazil.refine.planner import Plan
from frazil.refine.sampling import Grid, neighbours
from frazil.refine.timing import Clock
from frazil.refine.windows import Engine, Frame, Windows

DEPTH = 26.0  # nats below the best: e⁻²⁶ × 10⁶ samples is far under the mass 1 − 0.999 that may be dropped


@dataclass(frozen=True)
class Pass:
    """What one E-step works with: a model, its transforms, a grid, the windows' sizes."""

    model: Model
    volumes: list[Tensor]  # per class, half volume of the reference
    grid: Grid
    engine: Engine
    size: int  # n_c
    coarse_size: int  # n_0
    cc: bool  # cross-correlation instead of the likelihood
    clock: Clock


@dataclass(frozen=True)
class Found:
    """Samples found by a pass: image (in the batch), orientation + class · orientations, shift index, value."""

    image: Tensor
    orientation: Tensor
    shift: Tensor
    value: Tensor

    def __getitem__(self, keep: Tensor) -> Found:
        return Found(self.image[keep], self.orientation[keep], self.shift[keep], self.value[keep])


def reference_volumes(model: Model, size: int, engine: Engine) -> list[Tensor]:
    """Half volumes of the references, divided by the interpolation's sinc² before padding (spec 3.5)."""
    correction = sinc2(model.box, engine.pad, device=engine.device, dtype=engine.dtype)
    return [padded_ft(v.to(correction) / correction, engine.pad, size // 2) for v in model.maps]


def shift_phases(frame: Frame, shifts: Tensor, p: int, engine: Engine) -> Tensor:
    """(p, t) complex exp(−2πi k·t): multiplies an image's transform to move it by t Å (t, 2)."""
    angle = -2 * math.pi * frame.k[:p] @ shifts.to(frame.k.device).T
    return torch.polar(torch.ones_like(angle), angle).to(engine.complex)


def shift_prior(step: Pass, particles: Particles, index: Tensor, windows: Windows, pixel_size: float) -> Tensor:
    """(b, t) log of the Gaussian prior of the coarse, unperturbed shifts, around the prior shift or 0 (spec 2.5)."""
    old = windows.pre_shift[:, None].clone()
    if step.engine.relion_form:  # RELION ≥ 3.1 adds the old offset in px to the grid in Å and multiplies by a²
        total = (windows.pre_shift_px[:, None] + step.grid.shifts) * pixel_size
    else:
        if particles.prior_shift is not None:
            old -= particles.prior_shift[index][:, None]
        total = old + step.grid.shifts
    return -total.square().sum(-1) / (2 * step.model.sigma_offset**2)


def coarse_global(step: Pass, frame: Frame, y: Tensor, q: Tensor, shift_log: Tensor) -> tuple[Found, Tensor | None]:
    """Candidates of the whole coarse grid, pass 1, and the mass an image's list lacks (None: none that counts).

    psi + 180° comes free as the conjugate. Orientations are taken in chunks of what memory holds; with a single chunk, samples that
    cannot be significant are left out at once.
    """
    grid, engine = step.grid, step.engine
    p = frame.coarse_inside(step.coarse_size)
    phases = shift_phases(frame, grid.coarse_shifts(), p, engine)
    half = grid.first_half()
    chunk = max(grid.n_psi // 2, engine.budget // 8 // (p * (8 if engine.dtype == torch.float32 else 16)))
    fraction = engine.fraction if len(half) <= chunk and len(step.volumes) == 1 else None
    y, q = y[:, :p].contiguous(), q[:, :p].contiguous()
    log_direction = step.model.pdf_direction.log()
    found, left_out = [], None
    for k, volume in enumerate(step.volumes):
        for some in half.split(chunk):
            with step.clock("coarse slices"):
                rotations = grid.coarse_rotations(some).to(device=engine.device, dtype=engine.dtype)
                slices = project(volume, rotations, frame.coords[:p], engine.pad, implementation=engine.implementation)
            with step.clock("coarse products"):
                prior = log_direction[k][some // grid.n_psi].to(slices.real).expand(2, -1).contiguous()
                c = candidates(
                    slices, y, q, phases, prior, shift_log, depth=DEPTH, fraction=fraction, cc=step.cc, implementation=engine.implementation
                )
            left_out = c.left_out if fraction is not None else None
            mate, which = c.hypothesis // len(some), c.hypothesis % len(some)
            orientation = some.to(which.device)[which] + mate * (grid.n_psi // 2) + k * grid.orientations
            found.append(Found(c.image, orientation, c.shift, c.value))
    return _near_best(_join(found), len(y), step.cc), left_out


def _join(parts: list[Found]) -> Found:
    return (
        parts[0]
        if len(parts) == 1
        else Found(*(torch.cat([getattr(f, n) for f in parts]) for n in ("image", "orientation", "shift", "value")))
    )


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

    orientation: Tensor  # (s,) int64, CPU
    child: Tensor | None = None  # (s,) int64: children of a coarse orientation, None: coarse orientations themselves

    def __len__(self) -> int:
        return len(self.orientation)

    def chunks(self, users: Tensor, plan: Plan, grid: Grid, unit: int = 1) -> list[tuple[int, int, int, int]]:
        """(first slice, end slice, first user, end user) of chunks of one class within the plan's slices and users.

        users: slice (or group of `unit` slices) of each user, non-decreasing; a single group may exceed the number of users.
        """
        groups = len(self) // unit
        ends = torch.bincount(users, minlength=groups).cumsum(0).tolist()
        klass = (self.orientation[::unit] // grid.orientations).tolist()
        out, a, lo = [], 0, 0
        while a < groups:
            b = a + 1
            while b < groups and (b - a) * unit < plan.slices and ends[b] - lo <= plan.users and klass[b] == klass[a]:
                b += 1
            out.append((a * unit, b * unit, lo, ends[b - 1]))
            a, lo = b, ends[b - 1]
        return out

    def rotations(self, grid: Grid, a: int, b: int) -> Tensor:
        """(b − a, 3, 3) float64 rotations of slices a…b."""
        where = self.orientation[a:b] % grid.orientations
        return grid.coarse_rotations(where) if self.child is None else grid.fine_rotations(where, self.child[a:b])


def make_slices(step: Pass, slices: Slices, a: int, b: int, coords: Tensor) -> tuple[Tensor, Tensor]:
    """(b − a, p) slices a…b, all of one class, and their rotations on the device."""
    rotations = slices.rotations(step.grid, a, b).to(device=step.engine.device, dtype=step.engine.dtype)
    volume = step.volumes[int(slices.orientation[a]) // step.grid.orientations]
    return project(volume, rotations, coords, step.engine.pad, implementation=step.engine.implementation), rotations


def coarse_local(step: Pass, frame: Frame, prior: Tensor, y: Tensor, q: Tensor, shift_log: Tensor, plan: Plan) -> tuple[Found, Tensor]:
    """Every coarse sample near each particle's prior rotation that may be significant, pass 1; also their orientation priors."""
    grid, engine = step.grid, step.engine
    with step.clock("neighbours"):
        near = neighbours(grid, prior, engine.relion_form)
        k = step.model.classes
        image, o = near.image.repeat(k), near.orientation.repeat(k) + torch.arange(k).repeat_interleave(len(near.image)) * grid.orientations
        log = near.log_prior.repeat(k) + step.model.pdf_class.log().cpu().repeat_interleave(len(near.image))
        unique, row_slice = torch.unique(o, return_inverse=True)
        order = torch.argsort(row_slice, stable=True)
        slices = Slices(unique)
        row_slice, image, log = (t[order].to(engine.device) for t in (row_slice, image, log.to(engine.dtype)))
    p = frame.coarse_inside(step.coarse_size)
    phases = shift_phases(frame, grid.coarse_shifts(), p, engine)
    y, q = y[:, :p].contiguous(), q[:, :p].contiguous()
    best = torch.full((len(y),), -torch.inf, dtype=engine.dtype, device=y.device)
    found = []
    for a, b, lo, hi in slices.chunks(row_slice, plan, grid):
        with step.clock("coarse slices"):
            some = make_slices(step, slices, a, b, frame.coords[:p])[0]
        with step.clock("coarse products"):
            value = compare(some, row_slice[lo:hi] - a, image[lo:hi], y, q, phases, cc=step.cc, implementation=engine.implementation)
        with step.clock("thresholds"):
            value += shift_log[image[lo:hi]]
            value += log[lo:hi, None]
            best.scatter_reduce_(0, image[lo:hi], value.amax(1), "amax")
            row, t = torch.nonzero(value >= (best[image[lo:hi]] - DEPTH)[:, None], as_tuple=True)
            found.append(Found(image[lo:hi][row], row + lo, t, value[row, t]))
    near_best = _near_best(_join(found), len(y), step.cc)
    row = near_best.orientation
    return Found(near_best.image, unique.to(row.device)[row_slice[row]], near_best.shift, near_best.value), log[row]


@dataclass(frozen=True)
class Fine:
    """All children of significant coarse samples (entries, sorted by orientation, image and shift) and their log-posteriors."""

    slices: Slices  # the children of the distinct orientations
    orientation: Tensor  # (n,) number of an entry's orientation among the distinct ones
    image: Tensor  # (n,)
    shift: Tensor  # (n,) coarse
    value: Tensor  # (n, C, c) score + priors


def fine_pass(
    step: Pass, frame: Frame, coarse: Found, log_orientation: Tensor, y: Tensor, q: Tensor, shift_log: Tensor, plan: Plan
) -> Fine:
    """Pass 2: the children of significant coarse samples in the fine window."""
    grid, engine, p = step.grid, step.engine, frame.inside
    with step.clock("thresholds"):
        order = torch.argsort(coarse.image, stable=True)
        order = order[torch.argsort(coarse.orientation[order], stable=True)]
        coarse, prior = coarse[order], log_orientation[order]
        distinct, orientation = torch.unique_consecutive(coarse.orientation, return_inverse=True)
        slices = Slices(distinct.cpu().repeat_interleave(grid.children), torch.arange(grid.children).repeat(len(distinct)))
        prior = prior + shift_log[coarse.image, coarse.shift]
        phases = shift_phases(frame, grid.fine_shifts(), p, engine)
        sizes = (grid.children, grid.shift_children)
        value = torch.empty(len(prior), *sizes, dtype=engine.dtype, device=prior.device)
    for a, b, lo, hi in slices.chunks(orientation, plan, grid, unit=grid.children):
        with step.clock("fine slices"):
            some = make_slices(step, slices, a, b, frame.coords)[0]
        with step.clock("fine products"):
            value[lo:hi] = score(
                some, orientation[lo:hi] - a // grid.children, coarse.image[lo:hi], coarse.shift[lo:hi], prior[lo:hi], y, q, phases,
                children=sizes, cc=step.cc, implementation=engine.implementation,
            )  # fmt: skip
    return Fine(slices, orientation, coarse.image, coarse.shift, value)
