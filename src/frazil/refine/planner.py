"""From a memory budget to batch and chunk sizes (architecture 3.7). Pure arithmetic: the table `frazil doctor` prints comes from here."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from frazil.maths.fourier import half_volume_radius


@dataclass(frozen=True)
class Plan:
    """How much is worked on at once."""

    images: int  # particles in a batch
    slices: int  # fine slices in a chunk
    users: int  # what is compared with them in a chunk: rows (slice, image), or entries of the fine pass
    entries: int  # significant coarse samples whose children are scored at once
    sum_dtype: torch.dtype  # of the back-projected sums
    fixed: int  # bytes of volumes that stay for the whole E-step
    working: int  # bytes left for batches


def half_volume_bytes(box: int, pad: float, size: int, complex_bytes: int) -> int:
    """Bytes of a half volume that reaches shell size/2."""
    m = half_volume_radius(pad, min(size, box) // 2)
    return (2 * m + 1) ** 2 * (m + 1) * complex_bytes


def make_plan(budget: int, *, box: int, size: int, pad: float, classes: int, pixels: int, shifts: int, children: int, dtype: torch.dtype, on_gpu: bool) -> Plan:
    """Batch sizes for a budget in bytes: `pixels` in the window, `shifts` fine shifts, `children` of a coarse sample, references and sums of `classes` classes.

    The volumes come first; at least 1/20 of the budget (64 MB) is worked in whatever they take. Sums are kept in float64 on a CPU
    where that takes less than half of the budget; a GPU adds with float32 atomics and flushes (see refine/expectation).
    """
    real = 4 if dtype == torch.float32 else 8
    reference = classes * half_volume_bytes(box, pad, size, 2 * real)
    sums = {b: classes * half_volume_bytes(box, pad, size, 3 * b) for b in (4, 8)}
    double = dtype == torch.float64 or (not on_gpu and reference + sums[8] < budget // 2)
    fixed = reference + sums[8 if double else 4]
    working = max(budget - fixed, budget // 20, 64 << 20)
    image_bytes = pixels * 16 * real + box * box * 7 * real
    return Plan(
        images=max(1, working // 3 // image_bytes),
        slices=max(8, working // 6 // (pixels * 5 * real)),
        users=max(256, working // 8 // (shifts * 4 * real)),
        entries=max(1024, working // 6 // (children * (real + 10))),
        sum_dtype=torch.float64 if double else torch.float32,
        fixed=fixed,
        working=working,
    )
