"""From a memory budget to batch and chunk sizes (architecture 3.7). Pure arithmetic: the table `frazil doctor` prints comes from here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from frazil.maths.fourier import half_volume_radius

LEAST = 64 << 20  # bytes worked in, whatever the volumes take
MOST = 24 << 30  # and at most: larger batches are no faster
WINDOW_PIXELS = 1 << 27  # of the images that are transformed at once, at most


@dataclass(frozen=True)
class Shape:
    """What decides how much memory an E-step takes."""

    box: int  # px, side of the references
    size: int  # n_c, side of the window
    pad: float
    classes: int
    pixels: int  # in the window of the images
    shifts: int  # fine shifts
    children: int  # fine samples of a coarse one
    real: int = 4  # bytes of a real number: 4 or 8
    on_gpu: bool = False
    flat: bool = False  # 2D references


@dataclass(frozen=True)
class Plan:
    """How much is worked on at once."""

    images: int  # particles in a batch
    window_images: int  # particles whose whole images are in work at once, while their windows are cut out
    slices: int  # slices in a chunk
    users: int  # what is compared with them in a chunk: rows (slice, image), or entries of the fine pass
    entries: int  # significant coarse samples whose children are scored at once
    sum_dtype: torch.dtype  # of the back-projected sums
    fixed: int  # bytes of the volumes that stay for the whole E-step
    working: int  # bytes left for batches
    scores: int = 0  # bytes of a table of coarse scores; 0: as the op likes it (a CPU's cache)

    def score_images(self, slices: int, shifts: int) -> int | None:
        """Images whose coarse scores are held at once: two real tables of (images, shifts, slices)."""
        return max(1, self.scores // (8 * slices * shifts)) if self.scores else None


def half_volume_elements(box: int, size: int, pad: float, flat: bool) -> int:
    """Elements of a half volume (or half plane) of a window of side `size`."""
    m = half_volume_radius(pad, min(size, box) // 2)
    return (2 * m + 1) ** (1 if flat else 2) * (m + 1)


def make_plan(shape: Shape, budget: int, shrink: int = 1) -> Plan:
    """Batch sizes for `budget` bytes; `shrink` divides what is worked in after the device ran out of memory.

    The volumes come first. On a CPU the sums are float64 where that leaves half of the budget; a GPU adds with float32 atomics, one
    sum an iteration and half set; how far that reaches for very large sets was not measured.
    """
    elements = shape.classes * half_volume_elements(shape.box, shape.size, shape.pad, shape.flat)
    reference, sums = elements * 2 * shape.real, {real: elements * 3 * real for real in (4, 8)}
    double = shape.real == 8 or (not shape.on_gpu and reference + sums[8] < budget // 2)
    fixed = reference + sums[8 if double else 4]
    # A quarter is left for the allocator's fragments and what lives between the phases.
    working = min(max(3 * (budget - fixed) // 4, budget // 20, LEAST), MOST) // shrink
    whole_bytes = shape.box**2 * 8 * shape.real
    return Plan(
        images=max(1, working // 4 // (shape.pixels * 20 * shape.real)),
        window_images=max(1, min(working // 4 // whole_bytes, WINDOW_PIXELS // shape.box**2)),
        slices=max(8, working // 6 // (shape.pixels * 6 * shape.real)),
        users=max(256, working // 8 // (shape.shifts * 4 * shape.real)),
        entries=max(1024, working // 6 // (shape.children * (shape.real + 12))),
        sum_dtype=torch.float64 if double else torch.float32,
        fixed=fixed,
        working=working,
        scores=working // 3 if shape.on_gpu else 0,  # nothing but the images' windows is held beside them
    )


def keep_on_device(classes: int, box: int, flat: bool, budget: int) -> bool:
    """Whether the maps of all classes, three times over (old, new, and in work), leave half of the budget free."""
    return 3 * 4 * classes * box ** (2 if flat else 3) < budget // 2


def table(budget: int, boxes: tuple[int, ...] = (200, 256, 300, 360, 400, 512, 600, 800)) -> list[tuple[int, float, float, int]]:
    """(box, GB of volumes, GB to work in, particles a batch) of a refinement to Nyquist with one class in `budget` bytes on a GPU."""
    rows = []
    for box in boxes:
        plan = make_plan(Shape(box, box, 2.0, 1, int(math.pi * box**2 / 8), 84, 32, 4, True), budget)
        rows.append((box, plan.fixed / 1e9, plan.working / 1e9, plan.images))
    return rows
