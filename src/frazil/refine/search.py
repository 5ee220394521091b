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
    return parts[0] if len(parts) == 1 else Found(*(torch.cat([getattr(f, n) for f in parts]) for n in ("image", "orientation", "shift", "value")))


def _near_best(found: Found, images: int, only_best: bool) -> Found:
    """Drop samples more than DEPTH below the best of their image; with only_best keep one sample an image."""
    best = found.value.new_full((images,), -torch.inf).scatter_reduce(0, found.image, found.value, "amax")
    if not only_best:
        return found[found.value >= best[found.image] - DEPTH]
    at = torch.nonzero(found.value == best[found.image])[:, 0]
    first = torch.full((images,), len(found.value), dtype=torch.int64, device=at.device).scatter_reduce(0, found.image[at], at, "amin")
    return found[first[first < len(found.value)]]


def score_rows(
    step: Pass, frame: Frame, p: int, rows: Rows, y: Tensor, q: Tensor, shifts: Tensor, plan: Plan
) -> Found:
    """Candidates among rows (slice, image): score + log prior of every shift, and DEPTH or less below the image's best.

    Found.orientation is the row number.
    """
    engine = step.engine
    phases = shift_phases(frame, shifts, p, engine)
    y, q = y[:, :p].contiguous(), q[:, :p].contiguous()
    best = torch.full((len(y),), -torch.inf, dtype=engine.dtype, device=y.device)
    found = []
    for a, b, lo, hi in rows.chunks(plan, step.grid.orientations):
        with step.clock("fine slices"):
            slices = project_rows(step, rows, a, b, frame.coords[:p])
        with step.clock("fine products"):
            image = rows.image[lo:hi]
            value = compare(slices, rows.slice[lo:hi] - a, image, y, q, phases, cc=step.cc, implementation=engine.implementation)
        with step.clock("thresholds"):
            value = value + rows.log_prior(lo, hi)
            top = value.amax(1)
            best.scatter_reduce_(0, image, top, "amax")
            keep = torch.nonzero(top >= best[image] - DEPTH)[:, 0]
            value, image = value[keep], image[keep]
            row, t = torch.nonzero(value >= (best[image] - DEPTH)[:, None], as_tuple=True)
            found.append(Found(image[row], keep[row] + lo, t, value[row, t]))
    return _near_best(_join(found), len(y), step.cc)


@dataclass(frozen=True)
class Rows:
    """Comparisons of a slice with an image, sorted by slice. Slices are fine or coarse orientations; prior terms go by row and image."""

    slice: Tensor  # (r,) int64, into `orientation`/`child`, non-decreasing
    image: Tensor  # (r,) int64
    orientation: Tensor  # (s,) int64 coarse orientation + class · orientations
    child: Tensor | None  # (s,) int64 child of it, None: the coarse orientation itself
    log_row: Tensor  # (r,) log prior of the row
    log_shift: Tensor  # (b, t) log prior of the coarse shifts
    allowed: Tensor | None  # (pairs, t) bool, coarse shifts to consider, and
    pair: Tensor | None  # (r,) the pair of a row
    shift_children: int

    def log_prior(self, lo: int, hi: int) -> Tensor:
        """(hi − lo, t·children) log prior of rows lo…hi, −inf where not allowed."""
        log = self.log_shift[self.image[lo:hi]] + self.log_row[lo:hi, None]
        if self.allowed is not None and self.pair is not None:
            log = torch.where(self.allowed[self.pair[lo:hi]], log, -torch.inf)
        return log.repeat_interleave(self.shift_children, dim=1) if self.shift_children > 1 else log

    def chunks(self, plan: Plan, orientations: int) -> list[tuple[int, int, int, int]]:
        """(first slice, end slice, first row, end row) of chunks of one class, within the plan's slices and rows (one slice at least)."""
        ends = torch.bincount(self.slice, minlength=len(self.orientation)).cumsum(0).tolist()
        klass = (self.orientation // orientations).tolist()
        out, a, lo = [], 0, 0
        while a < len(klass):
            b = a + 1
            while b < len(klass) and b - a < plan.slices and ends[b] - lo <= plan.rows and klass[b] == klass[a]:
                b += 1
            out.append((a, b, lo, ends[b - 1]))
            a, lo = b, ends[b - 1]
        return out


def row_rotations(step: Pass, rows: Rows, a: int, b: int) -> Tensor:
    """(b − a, 3, 3) rotations of the orientations a…b of some rows, on the engine's device."""
    where = rows.orientation[a:b].cpu() % step.grid.orientations
    r = step.grid.coarse_rotations(where) if rows.child is None else step.grid.fine_rotations(where, rows.child[a:b].cpu())
    return r.to(device=step.engine.device, dtype=step.engine.dtype)


def project_rows(step: Pass, rows: Rows, a: int, b: int, coords: Tensor) -> Tensor:
    """(b − a, p) slices of the orientations a…b of some rows, all of one class."""
    volume = step.volumes[int(rows.orientation[a]) // step.grid.orientations]
    return project(volume, row_rotations(step, rows, a, b), coords, step.engine.pad, implementation=step.engine.implementation)


def coarse_local(step: Pass, frame: Frame, prior: Tensor, y: Tensor, q: Tensor, shift_log: Tensor, plan: Plan) -> tuple[Found, Tensor]:
    """Candidates among the neighbours of each particle's prior rotation, pass 1; also their orientation priors."""
    grid, engine = step.grid, step.engine
    near = neighbours(grid, prior, engine.relion_form)
    k = step.model.classes
    image, o = near.image.repeat(k), near.orientation.repeat(k) + torch.arange(k).repeat_interleave(len(near.image)) * grid.orientations
    log = near.log_prior.repeat(k) + step.model.pdf_class.log().cpu().repeat_interleave(len(near.image))
    unique, inverse = torch.unique(o, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    place = [t.to(engine.device) for t in (inverse[order], image[order], log[order].to(engine.dtype))]
    rows = Rows(place[0], place[1], unique, None, place[2], shift_log, None, None, 1)
    p = frame.coarse_inside(step.coarse_size)
    found = score_rows(step, frame, p, rows, y, q, grid.coarse_shifts(), plan)
    row = found.orientation
    return Found(found.image, unique.to(row.device)[rows.slice[row]], found.shift, found.value), rows.log_row[row]


def fine_rows(step: Pass, found: Found, log_orientation: Tensor, images: int, shift_log: Tensor) -> Rows:
    """Rows of the children of significant coarse samples: all children of an orientation, of a shift only where it was significant."""
    grid = step.grid
    key = found.orientation * images + found.image
    pairs, inverse = torch.unique(key, return_inverse=True)
    allowed = torch.zeros(len(pairs), len(grid.shifts), dtype=torch.bool, device=key.device)
    allowed[inverse, found.shift] = True
    log_pair = torch.zeros(len(pairs), dtype=log_orientation.dtype, device=key.device)
    log_pair[inverse] = log_orientation
    orientation, segment = torch.unique_consecutive(pairs // images, return_inverse=True)
    child = torch.arange(grid.children, device=key.device)
    slice_of = (segment[:, None] * grid.children + child).reshape(-1)
    order = torch.argsort(slice_of, stable=True)
    pair = order // grid.children
    return Rows(
        slice=slice_of[order],
        image=(pairs % images)[pair],
        orientation=orientation.repeat_interleave(grid.children),
        child=child.repeat(len(orientation)),
        log_row=log_pair[pair],
        log_shift=shift_log,
        allowed=allowed,
        pair=pair,
        shift_children=grid.shift_children,
    )
