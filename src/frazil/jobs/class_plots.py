"""Figures of a classification from plain arrays: slices of the maps, shares and resolutions of the classes, the course."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from frazil.jobs.plots import COLOURS, Array, column, new_figure, scale_bar, styled


@styled
def plot_class_slices(maps: Sequence[Array], titles: Sequence[str], pixel_size: float, diameter: float = 0.0) -> Figure:
    """Central slices along z, y, x of maps (z, y, x), a row a class, all on one grey scale, with a scale bar."""
    figure, axes = new_figure(6.6, 2.3 * len(maps), len(maps), 3)
    n = maps[0].shape[0]
    cut = slice(0, n)
    if 0 < diameter < n * pixel_size / 1.5:  # leave out empty margins
        reach = min(n // 2, round(0.75 * diameter / pixel_size))
        cut = slice(n // 2 - reach, n // 2 + reach)
    rows = [[v[n // 2][cut, cut], v[:, n // 2][cut, cut], v[:, :, n // 2][cut, cut]] for v in maps]
    low, high = np.percentile(np.concatenate([p.ravel() for row in rows for p in row]), [0.5, 99.8])
    for line, pictures, title in zip(axes, rows, titles, strict=True):
        for ax, shown, along in zip(line, pictures, "zyx", strict=True):
            ax.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower", interpolation="bicubic")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.set_xlabel(f"along {along}", fontsize=8)
            scale_bar(ax, shown.shape[-1], pixel_size)
        line[0].set_title(title, fontsize=10)
    return figure


def by_class(iterations: Sequence[Mapping[str, Any]], key: str) -> Array:
    """(iterations, K) floats of a recorded list, NaN where it is missing."""
    width = max(len(row.get(key) or []) for row in iterations)
    return np.array([[np.nan if v is None else v for v in (row.get(key) or [np.nan] * width)] for row in iterations], dtype=float)


@styled
def plot_classes(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels by iteration: the share of every class, stacked, and its resolution."""
    figure, axes = new_figure(9, 3.6, 1, 2)
    left, right = axes[0]
    number, share, resolution = column(iterations, "iteration"), by_class(iterations, "occupancy"), by_class(iterations, "class_resolution")
    order = np.argsort(share[-1])[::-1]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(order))]
    if len(number) > 1:
        left.stackplot(number, 100 * share[:, order].T, colors=colours, alpha=0.75, linewidth=0.5, edgecolor="white")
    else:
        left.bar([f"{k + 1}" for k in order], 100 * share[0, order], color=colours)
    left.set_ylabel("% of the particles")
    left.set_title("Shares")
    for place, (k, colour) in enumerate(zip(order, colours, strict=True)):
        values = np.where(share[:, k] > 0, resolution[:, k], np.nan)
        right.plot(number, values, marker="o", markersize=3, color=colour, label=f"class {k + 1}" if place < 6 else None)
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.set_ylabel("Å (own SSNR = 1)")
    right.set_title("Resolution")
    right.legend(fontsize=8, ncols=2)
    for ax in (left, right) if len(number) > 1 else (right,):
        ax.set_xlabel("iteration")
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


@styled
def plot_course(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Three panels by iteration: particles that change class, changes of angles and shifts, peak probability."""
    figure, axes = new_figure(9, 3.2, 1, 3)
    number = column(iterations, "iteration")
    moved = [("angles / °", column(iterations, "changes_rotation")), ("shifts / Å", column(iterations, "changes_shift"))]
    panels = (
        ("Changed class", "% of the particles", [("", 100 * column(iterations, "changes_class"))]),
        ("Poses", "degrees, Å", moved),
        ("Certainty", "mean peak probability", [("", column(iterations, "pmax"))]),
    )
    for ax, (title, unit, curves) in zip(axes[0], panels, strict=True):
        for colour, (label, values) in zip(COLOURS, curves, strict=False):
            ax.plot(number, values, marker="o", markersize=3.5, color=colour, label=label)
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_xlabel("iteration")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if curves[0][0]:
            ax.legend(fontsize=8)
    return figure
