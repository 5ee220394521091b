"""Which rows of a table stay: ranges, outliers, copies, splits, groups of micrographs; how optics groups of two files become one list.

Everything here answers with masks, indices or numbers; nothing is ever renumbered but where `join_optics` says so in its answer.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frazil.maths.peaks import highest_apart

MAD_TO_SD = 1.4826  # of a normal distribution
SAME = 1e-4  # relative difference of two settings that still are the same
DESCRIPTIVE = ("rlnOpticsGroup", "rlnOpticsGroupName", "rlnMtfFileName", "rlnDefectFile", "rlnMicrographGainName")


def in_range(values: Tensor, low: float | None, high: float | None) -> Tensor:
    """(n,) bool: low ≤ value ≤ high; a value that is no number never is."""
    kept = torch.isfinite(values)
    if low is not None:
        kept &= values >= low
    if high is not None:
        kept &= values <= high
    return kept


def within_spread(values: Tensor, sigma: float) -> Tensor:
    """(n,) bool: values within `sigma` standard deviations of the median; the standard deviation is 1.4826 times the median absolute
    deviation, so outliers do not widen their own limits (the plain one where more than half the values are the same)."""
    finite = torch.isfinite(values)
    if not bool(finite.any()):
        return finite
    middle = values[finite].double().quantile(0.5)
    away = (values.double() - middle).abs()
    spread = float(MAD_TO_SD * away[finite].quantile(0.5)) or float(values[finite].double().std(correction=0))
    return finite & (away <= sigma * spread) if spread > 0 else finite


def without_copies(place: Tensor, micrograph: Tensor, quality: Tensor, distance: float) -> Tensor:
    """(n,) bool: particles left when of those of a micrograph within `distance` of each other only the best stays.

    place (n, 2) in the unit of distance; micrograph (n,) int64; quality (n,): the higher stays, of equal ones the first.
    """
    kept = torch.zeros(len(place), dtype=torch.bool)
    order = torch.argsort(micrograph, stable=True)
    counts = torch.bincount(micrograph[order]) if len(order) else torch.zeros(0, dtype=torch.int64)
    for rows in order.split(counts[counts > 0].tolist()):
        best = highest_apart(place[rows].double().numpy(), quality[rows].double().numpy(), distance)
        kept[rows[torch.from_numpy(best.copy())]] = True
    return kept


def split_rows(n: int, size: int, count: int, generator: torch.Generator | None) -> list[Tensor]:
    """Indices (int64, ascending) of n rows in parts of `size` (the last may be smaller), or in `count` parts as equal as can be.

    With both, `count` parts of `size`, and the rest of the rows in none. In the order of the rows, or at random with a generator.
    Raises ValueError for more parts than rows.
    """
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    if size and count:
        if size * count > n:
            raise ValueError(f"{count} parts of {size} rows are more than the {n} there are")
        parts = list(order[: size * count].split(size))
    elif size:
        parts = list(order.split(size))
    else:
        if not 0 < count <= n:
            raise ValueError(f"{n} rows cannot be split into {count} parts")
        parts = [torch.from_numpy(part) for part in np.array_split(order.numpy(), count)]
    return [part.sort().values for part in parts]


def group_micrographs(micrograph: Tensor, key: Tensor, groups: int) -> Tensor:
    """(n,) int64 group from 0 of each particle: micrographs in the order of a key, cut where about n/groups particles are reached.

    micrograph (n,) int64 index; key (number of micrographs,), as the scale of their particles or their defocus: alike ones share a group.
    """
    counts = torch.bincount(micrograph, minlength=len(key))
    order = torch.argsort(key, stable=True)
    middle = counts[order].cumsum(0) - 0.5 * counts[order]
    group = torch.empty(len(key), dtype=torch.int64)
    group[order] = (middle * groups / max(1, len(micrograph))).floor().long().clamp(0, groups - 1)
    used = torch.zeros(groups, dtype=torch.bool)
    used[group[counts > 0]] = True
    return (used.cumsum(0) - 1)[group[micrograph]]


@dataclass(frozen=True)
class OpticsJoin:
    """Optics groups of several files as one list."""

    rows: list[dict[str, str]]  # one a group, label → text
    numbers: list[dict[str, str]]  # for each file: its number → number in the list
    renamed: list[str]  # what was changed, a line each
    differing: list[str]  # groups of one name whose settings differ, a line each


def join_optics(files: Sequence[Sequence[Mapping[str, str]]], names: Sequence[str]) -> OpticsJoin:
    """Union of the optics groups of several files by name (rows: label → text, with rlnOpticsGroup and rlnOpticsGroupName).

    Groups of the same name and settings are one, with the number the first file gives it. A number keeps its group wherever it is free;
    where it is taken by another, the group gets the next free number, and `renamed` says so. Groups of one name whose settings differ
    stay apart: the later one gets a name of its own.
    """
    rows: list[dict[str, str]] = []
    numbers, renamed, differing = [], [], []
    every = {row["rlnOpticsGroup"] for file in files for row in file}
    for file, where in zip(files, names, strict=True):
        table: dict[str, str] = {}
        for row in file:
            number, name = row["rlnOpticsGroup"], row["rlnOpticsGroupName"]
            wanted, k = name, 1
            while (known := by_name(rows, wanted)) is not None and not same_settings(known, row):
                k += 1
                wanted = f"{name}_{k}"
            if known is not None:
                table[number] = known["rlnOpticsGroup"]
            else:
                if wanted != name:
                    differing.append(f"{where}: optics group {name} has other settings than in an earlier file: kept apart as {wanted}")
                taken = {r["rlnOpticsGroup"] for r in rows}
                free = number if number not in taken else _next_free(taken | every)
                rows.append({**row, "rlnOpticsGroup": free, "rlnOpticsGroupName": wanted})
                table[number] = free
            if table[number] != number:
                renamed.append(f"{where}: optics group {number} ({name}) is number {table[number]} in the joined file")
        numbers.append(table)
    return OpticsJoin(rows, numbers, renamed, differing)


def by_name(rows: Sequence[Mapping[str, str]], name: str) -> Mapping[str, str] | None:
    """The optics group of a name."""
    return next((row for row in rows if row["rlnOpticsGroupName"] == name), None)


def same_settings(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two optics groups agree in every setting that both have."""
    for label in set(a) & set(b) - set(DESCRIPTIVE):
        if a[label] == b[label]:
            continue
        try:
            x, y = float(a[label]), float(b[label])
        except ValueError:
            return False
        if abs(x - y) > SAME * max(abs(x), abs(y)):
            return False
    return True


def _next_free(taken: set[str]) -> str:
    numbers = [int(t) for t in taken if t.isdigit()]
    return str(max(numbers, default=0) + 1)


def image_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (n,), sd (n,)) float64 of images (n, y, x)."""
    flat = images.flatten(1)
    mean = flat.mean(1, dtype=torch.float64)
    return mean, (flat.double() - mean[:, None]).square().mean(1).sqrt()


def numbers_of(text: str, most: int) -> NDArray[np.int64]:
    """Numbers of a list such as "1,4-7,12", ascending, each in 1 … most. Raises ValueError saying which is wrong."""
    out: set[int] = set()
    for item in text.replace(" ", ",").split(","):
        first, dash, last = item.partition("-")
        if not item:
            continue
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{item!r} is not a number or a range; write it like 1,4-7,12")
        low, high = int(first), int(last) if dash else int(first)
        if not 1 <= low <= high <= most:
            raise ValueError(f"{item}: numbers run from 1 to {most}")
        out.update(range(low, high + 1))
    if not out:
        raise ValueError("no number is given; write it like 1,4-7,12")
    return np.array(sorted(out), dtype=np.int64)
