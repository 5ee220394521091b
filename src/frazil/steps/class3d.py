"""3D classification: K maps from one reference or several (spec/refinement 4.2). The loop is steps/classify.py."""

from __future__ import annotations

import math

from torch import Tensor

from frazil.maths.filters import lowpass_map
from frazil.refine.classes import Reconstruction, reconstruct_classes, reference_power
from frazil.refine.convergence import Progress, finer_sampling
from frazil.refine.maximization import flatten_solvent, solvent_sphere
from frazil.refine.model import Statistics
from frazil.refine.sampling import Sampling
from frazil.refine.settings import setting
from frazil.steps.classify import ClassifyJob, ClassifyParams, ClassifyState, Form

LOCAL_ORDER = 4  # of the first finer grid (3.75 degrees, 1.9 oversampled)
TOO_FINE = 0.8  # a coarser sampling may do whose steps are below this part of the expected accuracy (spec 4.2)


class Class3dParams(ClassifyParams):
    """Several maps from particles and rough references."""

    symmetry: str = setting("C1", "point group of the particle: Cn, Dn, T, O, I, I1 to I4", level="basic")
    healpix_order: int = setting(2, "HEALPix order of the coarse orientation grid (2: 15 degrees, 7.5 oversampled)", ge=0, le=7)
    sigma_ang: float | None = setting(
        None, "search only near the last orientations: standard deviation of the angles; none: everywhere", "degrees", gt=0
    )
    equal_filter: float = setting(
        0.6, "part of the iterations in which the maps of all classes are filtered alike, so that none gains particles by being large; "
        "0: each by its own from the start, as RELION", ge=0, le=1,
    )  # fmt: skip
    auto_sampling: bool = setting(
        True, "after a quarter of the iterations search finer, near the last poses, while steps are coarser than the expected accuracy; "
        "not with --sigma-ang, --skip-align, --skip-rotate or --allow-coarser-sampling. no: one grid for all iterations, as RELION",
        level="basic",
    )  # fmt: skip
    allow_coarser_sampling: bool = setting(False, "use a coarser grid while its steps are finer than the expected accuracy")
    mask_lowpass_resolution: float = setting(30.0, "low-pass filter of the region of --mask-lowpass", "Å", gt=0)

    def sampling(self, pixel_size: float) -> Sampling:
        """The search grid the run starts with."""
        return Sampling(
            order=self.healpix_order, offset_range=self.offset_range * pixel_size, offset_step=self.offset_step * pixel_size,
            oversampling=self.oversampling, group=self.symmetry, factor=0.0 if self.skip_align else self.perturb, sigma=self.sigma_ang,
        )  # fmt: skip

    def next_sampling(self, progress: Progress, last: Sampling, box: int, pixel_size: float) -> Sampling:
        """The first grid; finer ones as the iterations go on (auto_sampling), or the coarsest that will do (spec 4.2)."""
        first = self.sampling(pixel_size)
        rotation, shift = progress.accuracy_rotation, progress.accuracy_shift
        if self.allow_coarser_sampling:
            if progress.iteration == 1:  # not known yet: what the resolution can tell apart
                diameter = self.diameter if self.diameter > 0 else box * pixel_size
                rotation, shift = 360 / math.ceil(math.pi * diameter * progress.shell / (box * pixel_size)), 0.0
            return coarser_sampling(first, rotation, shift)
        if not self.auto_sampling or self.skip_align or self.skip_rotate or self.sigma_ang is not None or last.order < first.order:
            return first
        order = scheduled_order(progress.iteration, self.iterations, first.order)
        if order <= last.order or last.step < rotation or rotation > 900:
            return first if last.order == first.order else last
        return finer_sampling(progress, last, order, local=True)


def scheduled_order(iteration: int, iterations: int, first: int) -> int:
    """HEALPix order up to which an iteration of so many may go: the first for a quarter of them, then two finer ones.

    Classes found with steps coarser than the accuracy drift apart in orientation and share the particles out by which of these fits
    the grid better, not by structure: from true classes too (docs/steps/class3d.md).
    """
    finer = max(first + 1, LOCAL_ORDER)
    if iteration <= (coarse := max(6, iterations // 4)):
        return first
    return finer if iteration <= coarse + max(6, iterations // 3) else finer + 1


def coarser_sampling(first: Sampling, accuracy_rotation: float, accuracy_shift: float) -> Sampling:
    """The coarsest grid with oversampled angles just below 0.8 of the accuracy (degrees), shifts of 0.8 of the accuracy (Å); spec 4.2."""
    order, q = first.order, 2**first.oversampling
    if accuracy_rotation < 900:
        while order > 0 and 360 / (6 * 2**order) / q < TOO_FINE * accuracy_rotation:
            order -= 1
        order = min(first.order, order + 1)
    step = TOO_FINE * accuracy_shift * q if accuracy_shift < 900 else 0.0
    step = max(first.offset_step, min(step, 0.95 * first.offset_range))
    return Sampling(
        order=order, offset_range=first.offset_range, offset_step=step, oversampling=first.oversampling, group=first.group,
        factor=first.factor, sigma=first.sigma,
    )  # fmt: skip


def new_maps(job: ClassifyJob, state: ClassifyState, statistics: Statistics, tau2: Tensor) -> Reconstruction:
    """Maps of this process's classes, where the present ones are."""
    assert isinstance(job.params, Class3dParams)
    p, model = job.params, state.model
    alike = state.progress.iteration <= p.equal_filter * p.iterations
    return reconstruct_classes(
        statistics, tau2, p.symmetry, model.box, job.engine, str(model.maps.device), alike=alike, world=job.world
    )  # fmt: skip


def finish_(job: ClassifyJob, maps: Tensor, pixel_size: float) -> Tensor:
    """Solvent-flattened maps (spec 3.6.10), in place: V·M, its second region's mean, and V·M_l low-passed. Of this process's classes."""
    p = job.params
    if not p.flatten_solvent:
        return maps
    assert isinstance(p, Class3dParams)
    mask = solvent_sphere(maps[0], pixel_size, p.diameter, p.mask_edge) if job.mask is None else job.mask.to(maps)
    for i in job.world.own(len(maps)):
        density = maps[i]
        if job.mask2 is None and job.mask_lowpass is None:
            density *= mask
            continue
        flat = flatten_solvent(density, pixel_size, p.diameter, p.mask_edge, mask, job.mask2)
        if job.mask_lowpass is not None:
            flat = flat + lowpass_map(density * job.mask_lowpass.to(density), pixel_size, p.mask_lowpass_resolution)
        maps[i] = flat
    return maps


FORM = Form(power=reference_power, reconstruct=new_maps, finish=finish_, each_its_own=True)
