"""Positions that were found in micrographs of another pixel size: which one that was, and the factor that brings them over."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from frazil.data import BadInput
from frazil.io.coordinates import NAME, PIXEL, root
from frazil.io.particles import ParticleSet
from frazil.io.star import as_table, first_table, read_star

BINNED = 0.05  # relative difference of pixel sizes from which micrographs were binned; below it one was calibrated, the pixels are the same
ROUNDING = 1e-3  # below it nothing is said
GROUP = "rlnOpticsGroup"


def pick_pixels(path: Path, found: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Å, pixel size of the micrograph in which the positions of each name were found, where that is known.

    It stands in the coordinates themselves (a column, or data_optics of a particle file), or in the summary.star that `frazil pick` writes
    beside them.
    """
    listed, optics = _summary(path), _optics(path)
    out = {}
    for name, table in found.items():
        if PIXEL in table and len(table):
            size = float(table[PIXEL].iloc[0])
        elif optics and GROUP in table and len(table):
            size = optics.get(str(table[GROUP].iloc[0]), 0.0)
        else:
            size = listed.get(name) or listed.get(root(name)) or 0.0
        if size > 0:
            out[name] = size
    return out


def _summary(path: Path) -> dict[str, float]:
    """By name of the micrograph and by its root: what summary.star beside the coordinates says."""
    try:
        found = first_table(read_star((path if path.is_dir() else path.parent) / "summary.star"), PIXEL)
    except BadInput:
        return {}
    if found is None or NAME not in found[1]:
        return {}
    names, sizes = [str(n) for n in found[1][NAME]], _numbers(found[1][PIXEL]).tolist()
    return {**dict(zip(map(root, names), sizes, strict=True)), **dict(zip(names, sizes, strict=True))}


def _optics(path: Path) -> dict[str, float]:
    """By optics group, of a STAR file with data_optics."""
    block = read_star(path, text=True).get("optics") if path.is_file() and path.suffix.lower() == ".star" else None
    if block is None or PIXEL not in block or GROUP not in block:
        return {}
    block = as_table(block)
    return dict(zip(block[GROUP].astype(str), _numbers(block[PIXEL]).tolist(), strict=True))


def _numbers(column: Any) -> np.ndarray:
    """float64 of a column, 0 where there is no number."""
    return np.nan_to_num(np.asarray(pd.to_numeric(column, errors="coerce"), dtype=float))


def refined_pixels(origin: ParticleSet) -> np.ndarray:
    """(n,) Å, pixel size of the micrographs that the particles' coordinates count in; 0 where their file does not say."""
    sizes = np.zeros(max(1, len(origin.particles.optics)))
    if PIXEL in origin.optics_table:
        sizes = _numbers(origin.optics_table[PIXEL])
    return sizes[origin.particles.group.numpy()]


def scale_factors(path: Path | str, before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """((n,) factors of coordinates counted in pixels of `before` Å (0: not known) for pixels of `now` Å, lines that say what was done)."""
    known = before > 0
    ratio = np.where(known, before / now, 1.0)
    binned = np.abs(ratio - 1) > BINNED
    near = ~binned & (np.abs(ratio - 1) > ROUNDING)
    lines = []
    for old, new in _pairs(before[binned], now[binned]):
        lines.append(f"{path}: coordinates count pixels of {old:g} Å, the micrographs have {new:g} Å: multiplied by {old / new:.4g}")
    for old, new in _pairs(before[near], now[near]):
        lines.append(f"{path}: says that its micrographs have pixels of {old:g} Å, now they have {new:g} Å: taken for a better calibration "
                     "of the same pixels, coordinates stay")  # fmt: skip
    return np.where(binned, ratio, 1.0), lines


def _pairs(before: np.ndarray, now: np.ndarray) -> Sequence[tuple[float, float]]:
    """Different pairs of pixel sizes."""
    return sorted(set(zip(before.round(5).tolist(), now.round(5).tolist(), strict=True)))
