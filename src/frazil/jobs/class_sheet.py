"""The sheet of class averages, largest class first: what users of a 2D classification look at. From plain arrays."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from frazil.io.mrc import read_mrc
from frazil.jobs.plots import Array, new_figure, scale_bar, styled

COLUMNS = 10
CELL = 1.15  # inches
MOST = 300  # averages on a sheet


@styled
def plot_averages(
    averages: Array, counts: Array, resolutions: Array, pixel_size: float, diameter: float = 0.0, columns: int = COLUMNS
) -> Figure:  # fmt: skip
    """Class averages (K, y, x) with their numbers, particle counts (K,) and resolutions (K,) in Å, by falling count.

    Each has its own grey scale, from its solvent to its brightest; empty classes are left out. A scale bar is on the first.
    """
    order = [k for k in np.argsort(-np.asarray(counts), kind="stable").tolist() if counts[k] > 0][:MOST] or [0]
    columns = min(columns, len(order))
    rows, n = -(-len(order) // columns), averages.shape[-1]
    cut = slice(0, n)
    if 0 < diameter < n * pixel_size / 1.1:  # leave out empty margins
        reach = min(n // 2, round(0.55 * diameter / pixel_size) + 2)
        cut = slice(n // 2 - reach, n // 2 + reach)
    side = len(range(*cut.indices(n)))
    gap, head = max(1, side // 16), round(0.34 * side / CELL)  # px between pictures, and above each for its title
    figure, axes = new_figure(columns * CELL, rows * (CELL + 0.34))
    ax = axes[0, 0]
    ax.set_axis_off()
    # One picture for all: axes for each of fifty take seconds to lay out.
    for place, k in enumerate(order):
        row, column = divmod(place, columns)
        left, bottom = column * (side + gap), (rows - 1 - row) * (side + head)
        shown = averages[k][cut, cut]
        low, high = np.percentile(shown, [1, 99.8])
        extent = (left, left + side, bottom, bottom + side)
        ax.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower", interpolation="bicubic", extent=extent)
        title = f"{k + 1}: {counts[k]:,}\n{resolutions[k]:.0f} Å"
        ax.text(left + side / 2, bottom + side + 0.1 * head, title, fontsize=6.5, ha="center", va="bottom")
        if place == 0:
            scale_bar(ax, side, pixel_size, origin=(left, bottom))
    ax.set_xlim(0, columns * (side + gap) - gap)
    ax.set_ylim(0, rows * (side + head))
    return figure


def last_stack(run_dir: Path) -> Path | None:
    """The stack of averages of the last iteration written."""
    found = [path for path in run_dir.glob("run_it*_classes.mrcs") if re.fullmatch(r"run_it\d{3,}_classes\.mrcs", path.name)]
    return max(found, key=lambda path: int(path.name[6:].split("_")[0]), default=None)


def sheet_of_run(run_dir: Path, last: Mapping[str, Any], diameter: float) -> Figure | None:
    """The sheet of a run directory's last averages; None where there are none. `last`: the event of its last iteration."""
    path = last_stack(run_dir)
    if path is None:
        return None
    stack = read_mrc(path)
    counts = np.asarray(last["class_counts"])
    resolutions = np.array([np.inf if value is None else value for value in last["class_resolution"]])  # None: the class is empty
    return plot_averages(stack.data.numpy(), counts, resolutions, stack.pixel_size, diameter)
