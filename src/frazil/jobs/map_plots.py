"""Figures of masks, post-processing and local resolution from plain arrays; each returns a matplotlib Figure, axes labelled with units."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from frazil.jobs.plots import COLOURS, LEVEL, Array, frequencies, new_figure, resolution_axis, scale_bar, styled

BEST_IS_BLUE = "Spectral_r"  # colours of local resolution, blue = fine
EMPTY = -90.0  # ln amplitudes below this stand for "nothing left"


@styled
def plot_threshold(threshold: Array, volume: Array, proposals: Mapping[str, float], chosen: float) -> Figure:
    """Volume left by a threshold (ln scale), the proposals, and the threshold taken."""
    figure, axes = new_figure(7, 3.8)
    ax = axes[0, 0]
    seen = volume > volume[0] / 1e4
    ax.semilogy(threshold[seen], volume[seen], color=COLOURS[0])
    for colour, (name, value) in zip(COLOURS[2:], proposals.items(), strict=False):
        ax.axvline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {value:.3g}")
    ax.axvline(chosen, color=COLOURS[1], linewidth=1.6, label=f"taken: {chosen:.3g}")
    ax.set_xlabel("threshold / density of the low-passed map")
    ax.set_ylabel("volume above it / Å³")
    ax.legend(loc="upper right")
    return figure


@styled
def plot_mask(data: Array, mask: Array, pixel_size: float) -> Figure:
    """Central slices of a map along the three axes with the mask's levels 0.01, 0.5 and 0.99 as lines."""
    figure, axes = new_figure(9, 3.3, 1, 3)
    for ax, (picture, outline, labels) in zip(axes[0], _slices(data, mask), strict=True):
        low, high = np.percentile(picture, [0.5, 99.8])
        ax.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower")
        if outline.max() > 0.5:
            ax.contour(outline, levels=[0.01, 0.5, 0.99], colors=[COLOURS[3], COLOURS[1], COLOURS[3]], linewidths=[0.7, 1.4, 0.7])
        _bare(ax, labels, picture.shape[-1], pixel_size)
    return figure


@styled
def plot_guinier(k2: Array, curves: Mapping[str, Array], line: tuple[float, float] | None, fit: tuple[float, float]) -> Figure:
    """ln⟨|F|⟩ against k² by name, with the fitted line (slope, intercept) between the k² of `fit`."""
    figure, axes = new_figure(7, 4.2)
    ax = axes[0, 0]
    lowest = []
    for colour, (name, values) in zip((COLOURS[5], COLOURS[3], COLOURS[0], COLOURS[2]), curves.items(), strict=False):
        shown = np.where(values > EMPTY, values, np.nan)
        lowest.append(np.nanmin(shown[1:]) if np.isfinite(shown[1:]).any() else 0.0)
        ax.plot(k2[1:], shown[1:], color=colour, label=name)
    if line is not None:
        ax.plot(fit, [line[1] + line[0] * x for x in fit], color=COLOURS[1], linewidth=2.2,
                label=f"slope {line[0]:.1f} Å², B = {4 * line[0]:.0f} Å²")  # fmt: skip
    ax.set_ylim(bottom=max(min(lowest, default=-20) - 0.3, -40))
    ax.set_xlabel("k² / Å⁻²")
    ax.set_ylabel("ln of the mean amplitude")
    ax.legend(fontsize=9)
    return figure


@styled
def plot_resolution_histogram(values: Array, overall: float | None = None) -> Figure:
    """Histogram of local resolutions in Å, with its median and, where known, the resolution of the whole map."""
    figure, axes = new_figure(7, 3.4)
    ax = axes[0, 0]
    low, high = np.percentile(values, [0.1, 99.5])
    ax.hist(values, bins=60, range=(low, max(high, low + 0.1)), color=COLOURS[0])
    ax.axvline(np.median(values), color=COLOURS[1], label=f"median {np.median(values):.2f} Å")
    if overall is not None and overall < 900:
        ax.axvline(overall, label=f"whole map {overall:.2f} Å", **LEVEL)
    ax.set_xlabel("local resolution / Å")
    ax.set_ylabel("voxels")
    ax.legend()
    return figure


@styled
def plot_local_resolution(data: Array, resolution: Array, inside: Array, pixel_size: float, level: float) -> Figure:
    """Surface of a map (z, y, x) at a density level seen along x, y and z, and central slices, coloured by resolution in Å.

    inside: (z, y, x) bool, voxels whose resolutions set the colour scale. The surface is where a ray first meets the level.
    """
    figure, axes = new_figure(9.6, 6.2, 2, 3)
    known = resolution[inside] if inside.any() else resolution
    low, high = np.percentile(known, [2, 98])
    scale = Normalize(low, max(high, low + 0.1))
    for ax, (axis, labels) in zip(axes[0], ((0, "xyz"), (1, "xzy"), (2, "yzx")), strict=True):
        ax.imshow(surface(data, resolution, axis, level, scale), origin="lower", interpolation="bilinear")
        _bare(ax, labels, data.shape[-1], pixel_size, "black", "seen along")
    for ax, (picture, colour, labels) in zip(axes[1], _slices(data, resolution), strict=True):
        shade = np.clip(picture / max(level, 1e-30), 0, 1)[..., None]
        ax.imshow(colormaps[BEST_IS_BLUE](scale(colour))[..., :3] * shade + 0.96 * (1 - shade), origin="lower")
        _bare(ax, labels, picture.shape[-1], pixel_size, "black")
    mappable = figure.colorbar(_mappable(scale), ax=axes, shrink=0.8, aspect=30)
    mappable.set_label("local resolution / Å")
    return figure


def surface(data: Array, resolution: Array, axis: int, level: float, scale: Normalize) -> Array:
    """(rows, columns, 3) picture of the surface data = level seen along an axis, coloured by resolution, shaded by its slope."""
    above: Array = np.moveaxis(data, axis, 0) >= level
    hit: Array = np.any(above, axis=0)
    first = above.argmax(0)
    rows, columns = np.indices(first.shape)
    values = np.moveaxis(resolution, axis, 0)[first, rows, columns]
    # The height between two voxels, from the densities before and at the surface, keeps steps out of the shading.
    moved = np.moveaxis(data, axis, 0)
    before = moved[np.maximum(first - 1, 0), rows, columns]
    at = moved[first, rows, columns]
    depth = first - np.clip((at - level) / np.maximum(at - before, 1e-30), 0, 1)
    depth = np.where(hit, depth, data.shape[axis])
    slope = np.gradient(depth)
    normal = 1 / np.sqrt(1 + slope[0] ** 2 + slope[1] ** 2)
    light = (0.35 + 0.65 * np.clip((1 + 0.6 * slope[1] + 0.4 * slope[0]) * normal, 0, 1.25) / 1.25)[..., None]
    far = (1 - 0.25 * (depth - depth.min()) / max(np.ptp(depth[hit]) if hit.any() else 1, 1))[..., None]
    coloured = colormaps[BEST_IS_BLUE](scale(values))[..., :3] * light * np.clip(far, 0, 1)
    return np.where(hit[..., None], np.clip(coloured, 0, 1), 1.0)


@styled
def plot_directional(curves: Array, box: int, pixel_size: float, resolutions: Array, weight: Array) -> Figure:
    """Conical FSC curves (directions, shells): mean, spread and extremes; beside it the histogram of directional resolutions in Å."""
    figure, axes = new_figure(9.6, 3.8, 1, 2)
    left, right = axes[0]
    k = frequencies(curves.shape[-1], box, pixel_size)
    mean, spread = curves.mean(0), curves.std(0)
    left.fill_between(k, curves.min(0), curves.max(0), color=COLOURS[0], alpha=0.15, linewidth=0, label="all directions")
    left.fill_between(k, mean - spread, mean + spread, color=COLOURS[0], alpha=0.35, linewidth=0, label="± 1 SD")
    left.plot(k, mean, color=COLOURS[0], label="mean")
    for level in (0.5, 0.143):
        left.axhline(level, **LEVEL)
    left.set_ylim(-0.1, 1.03)
    left.set_ylabel("FSC in cones")
    resolution_axis(left, 0.5 / pixel_size)
    left.legend(fontsize=9)
    right.hist(resolutions, bins=30, weights=weight, color=COLOURS[2])
    right.set_xlabel("resolution at FSC 0.143 / Å")
    right.set_ylabel("share of directions")
    return figure


@styled
def plot_sphere(rot: Array, tilt: Array, panels: Mapping[str, tuple[Array, str]]) -> Figure:
    """Maps of the sphere of directions (degrees), one a panel: name → (value at each direction, label of its colours)."""
    figure, _ = new_figure(5.2 * len(panels), 3.8)
    figure.clear()
    for index, (name, (values, label)) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(1, len(panels), index, projection="mollweide")
        lon, lat = np.radians((np.asarray(rot) + 180) % 360 - 180), np.radians(90 - np.asarray(tilt))
        shown = ax.scatter(lon, lat, c=values, s=60000 / len(lon), cmap="viridis", linewidths=0, rasterized=True)
        ax.set_xticklabels([])
        ax.set_yticklabels([])
        ax.grid(True, color="white", linewidth=0.4, alpha=0.6)
        ax.set_title(name, pad=16)
        figure.colorbar(shown, ax=ax, shrink=0.6, orientation="horizontal", pad=0.06).set_label(label)
    return figure


def _slices(data: Array, other: Array) -> list[tuple[Array, Array, str]]:
    """(slice, the same of `other`, axis letters across, up, along) through the middle along z, y, x."""
    n = data.shape[-1] // 2
    return [(data[n], other[n], "xyz"), (data[:, n], other[:, n], "xzy"), (data[:, :, n], other[:, :, n], "yzx")]


def _bare(ax: Axes, labels: str, side: int, pixel_size: float, colour: str = "white", word: str = "slice along") -> None:
    """A picture without ticks, with its axes' letters and a scale bar."""
    across, up, along = labels
    ax.set_title(f"{word} {along}", fontsize=10)
    ax.set_xlabel(f"{across} →", fontsize=9)
    ax.set_ylabel(f"{up} →", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    scale_bar(ax, side, pixel_size, colour)


def _mappable(scale: Normalize):
    """What a colour bar is drawn from."""
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(scale, BEST_IS_BLUE)
