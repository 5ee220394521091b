"""Decisions between iterations: image size, sampling, convergence (spec/refinement 2.6, 3.9, 4.5). Plain arithmetic on a frozen record."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.maths.fourier import round_half_away
from frazil.maths.rotation import axis_change
from frazil.refine.maximization import MIN_SHELL
from frazil.refine.sampling import Sampling


@dataclass(frozen=True)
class Progress:
    """Where an auto-refinement stands."""

    iteration: int
    shell: int  # resolution shell R
    increment: int = 10  # shells beyond R in the window (incr_size)
    high_fsc: bool = False  # FSC at the edge of the window was high once: grow fast
    no_gain: int = 0  # iterations without better resolution
    no_change: int = 0  # iterations in which poses moved little
    change_rotation: float = 999.0  # degrees
    change_shift: float = 999.0  # Å
    smallest_rotation: float = 999.0
    smallest_shift: float = 999.0
    change_class: float = 0.0  # fraction of particles that went to another class
    smallest_class: float = 999.0
    accuracy_rotation: float = 999.0  # degrees
    accuracy_shift: float = 999.0  # Å
    fine_enough: bool = False
    converged: bool = False
    ave_pmax: float = 0.0
    size: int = 0  # n_c of the last iteration
    coarse_size: int = 0


def window_size(progress: Progress, box: int, everything: bool = False) -> int:
    """n_c of the next iteration (3.4)."""
    if everything:
        return box
    beyond = round_half_away(0.25 * box / 2) if progress.ave_pmax > 0.1 and progress.high_fsc else progress.increment
    return min(box, 2 * (progress.shell + beyond))


def coarse_window(sampling: Sampling, box: int, pixel_size: float, diameter: float, size: int, keep_safe: float = 1.2) -> int:
    """n_0 (2.3): the resolution at which a coarse step still matters, with a safety factor (1.2 in 3D, 1.5 in 2D)."""
    if sampling.oversampling == 0:
        return size
    diameter = diameter if diameter > 0 else box * pixel_size
    resolution = sampling.coarse_step / 360 * math.pi * diameter / keep_safe
    return min(size, 2 * math.ceil(pixel_size * box / resolution))


def resolution_shell_of(data_vs_prior: Tensor) -> int:
    """Shell before the first with SSNR < 1, at least 5; a dip is jumped when signal goes on 3 shells further (3.9)."""
    below = torch.nonzero(data_vs_prior[1:] < 1)[:, 0]
    shell = int(below[0]) if len(below) else len(data_vs_prior) - 1
    above = torch.nonzero(data_vs_prior[1:] > 1)[:, 0] + 1
    highest = int(above[-1]) if len(above) else 0
    return max(MIN_SHELL, highest if highest > shell + 3 else shell)


def first_below(curve: Tensor, value: float) -> int:
    """First shell ≥ 1 below a value; the last one if none is."""
    below = torch.nonzero(curve[1:] < value)[:, 0]
    return int(below[0]) + 1 if len(below) else len(curve) - 1


def after_maximization(
    progress: Progress, fsc: Tensor, data_vs_prior: Tensor, box: int, pixel_size: float, initial_shell: int | None
) -> Progress:
    """Resolution, size increment and counters after an M-step. initial_shell: R is fixed there (after a cross-correlation iteration)."""
    shell = resolution_shell_of(data_vs_prior) if initial_shell is None else initial_shell
    edge = progress.size // 2 - 1
    scale = box * pixel_size
    gained = shell / scale > progress.shell / scale + 1e-4
    return replace(
        progress,
        shell=shell,
        high_fsc=progress.high_fsc or bool(fsc[edge] > 0.2),
        increment=max(progress.increment, first_below(fsc, 0.143) - first_below(fsc, 0.5) + 5),
        no_gain=0 if gained else progress.no_gain + 1,
    )


def changes(old_rotation: Tensor, new_rotation: Tensor, old_shift: Tensor, new_shift: Tensor, operators: Tensor) -> tuple[float, float]:
    """(degrees, Å): how far poses moved in an iteration (4.5)."""
    rotation = float(axis_change(old_rotation, new_rotation, operators).mean())
    shift = float(((old_shift - new_shift).square().sum() / (2 * len(old_shift))).sqrt())
    return rotation, shift


def after_classification(progress: Progress, shell: int, side: float) -> Progress:
    """The resolution shell of the best class and the count of iterations without a better one; side: of the box, Å (3.9)."""
    gained = shell / side > progress.shell / side + 1e-4
    return replace(progress, shell=shell, no_gain=0 if gained else progress.no_gain + 1)


def after_changes(progress: Progress, rotation: float, shift: float, sampling: Sampling, klass: float = 0.0) -> Progress:
    """Counts iterations in which poses and classes hardly changed, keeps the smallest changes seen at this sampling (4.5)."""
    steady_shift = shift / sampling.fine_offset_step < 0.40 or 1.03 * shift >= progress.smallest_shift
    steady_rotation = rotation / sampling.step < 0.40 or 1.03 * rotation >= progress.smallest_rotation
    steady_class = klass == 0 or 1.03 * klass >= progress.smallest_class
    return replace(
        progress,
        no_change=progress.no_change + 1 if steady_shift and steady_rotation and steady_class else 0,
        change_rotation=rotation,
        change_shift=shift,
        change_class=klass,
        smallest_class=min(progress.smallest_class, float(round_half_away(klass))),
        smallest_rotation=min(progress.smallest_rotation, rotation),
        smallest_shift=min(progress.smallest_shift, shift),
    )


def resolution_step(fsc: Tensor, box: int, pixel_size: float, diameter: float) -> float:
    """Degrees d/2D: errors of up to half a step of this size move the particle's rim by an eighth of the resolution d (FSC 0.143).

    Finer sampling changes no Fourier component by more than a few per cent.
    """
    d = box * pixel_size / max(1, first_below(fsc, 0.143))
    return math.degrees(0.5 * d / (diameter if diameter > 0 else box * pixel_size))


def finer_sampling(progress: Progress, sampling: Sampling, order: int, local: bool) -> Sampling:
    """The grid of a finer order, its shifts as fine as their accuracy asks and as far as they moved (4.5); local: near the last poses."""
    q = 2**sampling.oversampling
    step = min(1.5, 0.75 * progress.accuracy_shift) * q
    reach = max(min(5 * progress.change_shift, 1.3 * sampling.offset_range), 1.5 * step)
    if reach > 4 * step:
        reach /= 2
        if reach > 4 * step:
            step = reach / 4
    if step > sampling.offset_step:
        step, reach = sampling.offset_step, sampling.offset_range
    finer = replace(sampling, order=order, offset_step=step, offset_range=reach)
    return replace(finer, sigma=2 * finer.step) if local else finer


def next_sampling(
    progress: Progress, sampling: Sampling, local_order: int, maximum_order: int | None = None, enough: float = 0.0
) -> tuple[Progress, Sampling, bool]:
    """Finer sampling when resolution and poses have settled (4.5); the third value tells whether it changed.

    maximum_order: the user's limit of the coarse order. enough: a step (degrees) below which finer sampling brings nothing.
    """
    if progress.no_gain < 1 or progress.no_change < 1:
        return progress, sampling, False
    limit = max(0.75 * progress.accuracy_rotation, enough)
    if sampling.step < limit or (maximum_order is not None and sampling.order >= maximum_order):
        return replace(progress, fine_enough=True), sampling, False
    finer = finer_sampling(progress, sampling, sampling.order + 1, sampling.order + 1 >= local_order)
    reset = replace(progress, fine_enough=False, no_gain=0, no_change=0, smallest_rotation=999.0, smallest_shift=999.0)
    return reset, finer, True


def is_converged(progress: Progress) -> bool:
    """Nothing more to gain: sampling fine enough, resolution and poses settled (4.5)."""
    return progress.fine_enough and progress.no_gain >= 1 and progress.no_change >= 1
