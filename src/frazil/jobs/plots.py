"""Figures of a refinement from plain arrays: each function returns a matplotlib Figure, axes labelled with units."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import healpix
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

Array = NDArray[Any]
STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e7eb", "axes.axisbelow": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "axes.edgecolor": "#7b8794", "xtick.color": "#3e4c59", "ytick.color": "#3e4c59", "lines.linewidth": 1.8,
}  # fmt: skip
COLOURS = ("#1f6fb2", "#d1495b", "#2a9d6f", "#e09f3e", "#6a4c93", "#7b8794")
ROUND_RESOLUTIONS = (100, 50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.75, 2.5, 2.25, 2, 1.8, 1.6, 1.4, 1.2, 1)
LEVEL = {"color": "#52606d", "linewidth": 0.9, "linestyle": (0, (4, 3))}  # a line to compare with
UNKNOWN = 900.0  # values from here on stand for "not known" in RELION's files
P = ParamSpec("P")


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with our style without changing matplotlib's settings for others."""

    @wraps(plot)
    def inside(*args: P.args, **options: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return plot(*args, **options)

    return inside


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, margins: tuple[float, float, float, float] | None = None
) -> tuple[Figure, Array]:
    """A figure of so many inches with its axes (rows, columns), drawn off screen.

    margins: inches left of, below, right of and above each of the axes. None: as much as their labels need, which takes as long to find
    out as drawing.
    """
    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    if margins:
        left, below, right, above = margins
        wide, high = width / columns - left - right, height / rows - below - above
        figure.subplots_adjust(left / width, below / height, 1 - right / width, 1 - above / height, (left + right) / wide,
                               (below + above) / high)  # fmt: skip
    return figure, axes


def frequencies(shells: int, box: int, pixel_size: float) -> Array:
    """(shells,) spatial frequency in 1/Å of shells 0, 1, …."""
    return np.arange(shells) / (box * pixel_size)


def resolution_axis(axes: Axes, highest: float) -> None:
    """Write resolutions in Å under an axis of frequencies in 1/Å that ends at `highest`."""
    wanted = [d for d in ROUND_RESOLUTIONS if 1 / d <= highest]
    places: list[float] = []
    for d in wanted:  # leave out labels that would touch the one before
        if not places or 1 / d - 1 / places[-1] > highest / 12:
            places.append(d)
    axes.set_xticks([1 / d for d in places], [f"{d:g}" for d in places])
    axes.set_xlim(0, highest)
    axes.set_xlabel("resolution / Å")


@styled
def plot_fsc(curves: Mapping[str, Sequence[float] | Array], box: int, pixel_size: float, resolution: float | None = None) -> Figure:
    """FSC curves (name → value a shell) against resolution, with the 0.5 and 0.143 lines; `resolution` in Å is marked."""
    figure, axes = new_figure(7, 4.2)
    ax = axes[0, 0]
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        ax.plot(frequencies(len(curve), box, pixel_size), np.asarray(curve, dtype=float), label=name, color=colour)
    highest = 0.5 / pixel_size
    for level in (0.5, 0.143):
        ax.axhline(level, **LEVEL)
        ax.annotate(f"{level:g}", (1, level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                    color=LEVEL["color"], fontsize=9)  # fmt: skip
    ax.axhline(0, color="#7b8794", linewidth=0.8)
    if resolution:
        ax.axvline(1 / resolution, color="#d1495b", linewidth=1, linestyle=":")
        left = 1 / resolution > 0.75 * highest
        ax.annotate(f"{resolution:.2f} Å", (1 / resolution, 0.93), (-5 if left else 5, 0), textcoords="offset points", color="#d1495b",
                    ha="right" if left else "left", weight="bold")  # fmt: skip
    resolution_axis(ax, highest)
    lowest = min((float(np.nanmin(np.asarray(c, dtype=float))) for c in curves.values()), default=0.0)
    ax.set_ylim(min(-0.05, max(lowest - 0.05, -0.5)), 1.03)
    ax.set_ylabel("Fourier shell correlation")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(4, len(curves)), columnspacing=1.4)
    return figure


@styled
def plot_progress(iterations: Sequence[Mapping[str, Any]], box: int, pixel_size: float) -> Figure:
    """Four panels by iteration: resolution and window, angles, shifts, peak probability and time."""
    figure, axes = new_figure(9, 5.6, 2, 2)
    number = column(iterations, "iteration")

    def draw(ax: Axes, items: Sequence[tuple[str, Array]], unit: str, log: bool = False) -> None:
        for colour, (label, values) in zip(COLOURS, items, strict=False):
            if np.isfinite(values).any():
                ax.plot(number, values, marker="o", markersize=3.5, color=colour, label=label)
        ax.set_ylabel(unit)
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if ax.has_data():
            ax.legend(fontsize=9)

    edge = 2 * box * pixel_size / np.where(column(iterations, "current_size") > 0, column(iterations, "current_size"), np.nan)
    draw(axes[0, 0], [("resolution", column(iterations, "resolution")), ("edge of the window used", edge)], "Å", log=True)
    axes[0, 0].axhline(2 * pixel_size, **LEVEL)
    axes[0, 0].annotate("Nyquist", (0, 2 * pixel_size), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                        fontsize=9, color=LEVEL["color"])  # fmt: skip
    axes[0, 0].set_title("Resolution")
    accuracy, change = "estimated accuracy", "change from the iteration before"
    angles = [(accuracy, column(iterations, "accuracy_rotation")), (change, column(iterations, "changes_rotation"))]
    step = 30.0 / 2.0 ** column(iterations, "healpix_order")  # oversampled once: 360 / (6·2^(o+1))
    draw(axes[0, 1], [*angles, ("sampling step", step)], "degrees", log=True)
    axes[0, 1].set_title("Orientations")
    shifts = [(accuracy, column(iterations, "accuracy_shift")), (change, column(iterations, "changes_shift"))]
    draw(axes[1, 0], shifts, "Å", log=True)
    axes[1, 0].set_title("Shifts")
    draw(axes[1, 1], [("mean peak probability", column(iterations, "pmax"))], "probability")
    axes[1, 1].set_ylim(0, 1.02)
    axes[1, 1].set_title("Certainty of the poses")
    for ax in axes[1]:
        ax.set_xlabel("iteration")
    return figure


def column(iterations: Sequence[Mapping[str, Any]], key: str) -> Array:
    """One value an iteration as floats, NaN where it is missing, null or "not known"."""
    values = np.array([np.nan if row.get(key) is None else row[key] for row in iterations], dtype=float)
    return np.where(values < UNKNOWN, values, np.nan)


@styled
def plot_directions(rot: Array, tilt: Array, operators: Array, symmetry: str = "C1") -> Figure:
    """Where particles were seen from: counts on a Mollweide map of the sphere, a direction and its symmetry mates alike.

    rot, tilt (n,) in degrees; operators (g, 3, 3) of the point group named `symmetry`. The sphere is cut into HEALPix pixels large
    enough to hold about eight views each.
    """
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot(projection="mollweide")
    a, b = np.radians(rot), np.radians(tilt)
    vectors = np.stack([np.sin(b) * np.cos(a), np.sin(b) * np.sin(a), np.cos(b)], -1)
    mates = np.einsum("gij,nj->gni", operators, vectors).reshape(-1, 3)
    nside = 2 ** int(np.clip(np.log2(max(len(mates), 1) / 96) / 2, 1, 4))
    counts = np.bincount(healpix.vec2pix(nside, *mates.T), minlength=12 * nside**2)
    longitude, latitude = np.linspace(-np.pi, np.pi, 361), np.linspace(-np.pi / 2, np.pi / 2, 181)
    lon, lat = (0.5 * (g[1:] + g[:-1]) for g in (longitude, latitude))
    pixel = healpix.ang2pix(nside, (np.pi / 2 - lat)[:, None], (lon % (2 * np.pi))[None])
    mesh = ax.pcolormesh(longitude, latitude, counts[pixel], cmap="viridis", rasterized=True, vmin=0)
    figure.colorbar(mesh, ax=ax, shrink=0.75, label=f"views in {41253 / len(counts):.0f} square degrees")
    edge = [withStroke(linewidth=2, foreground="#1f2933")]
    across = ["−120°", "−60°", "rot 0°", "60°", "120°"]
    ax.set_xticks(np.radians([-120, -60, 0, 60, 120]), across, fontsize=8, color="white", path_effects=edge)
    ax.set_yticks(np.radians([-60, -30, 0, 30, 60]), ["150°", "120°", "tilt 90°", "60°", "30°"], fontsize=8)
    ax.set_axisbelow(False)
    ax.grid(True, color="white", linewidth=0.4, alpha=0.5)
    mates_too = f", with their {symmetry} mates" if len(operators) > 1 else ""
    ax.set_title(f"{len(rot):,} viewing directions{mates_too}")
    return figure


@styled
def plot_map(data: Array, pixel_size: float, diameter: float = 0.0) -> Figure:
    """Central slices and projections of a map (z, y, x) along its three axes, each row on one grey scale, with a scale bar."""
    figure, axes = new_figure(8.4, 5.8, 2, 3)
    n = data.shape[-1]
    cut = slice(0, n)
    if 0 < diameter < n * pixel_size / 1.5:  # leave out empty margins
        reach = min(n // 2, round(0.75 * diameter / pixel_size))
        cut = slice(n // 2 - reach, n // 2 + reach)
    rows = {"slice": [data[n // 2], data[:, n // 2], data[:, :, n // 2]], "projection": [data.sum(axis) for axis in range(3)]}
    for row, (kind, pictures) in zip(axes, rows.items(), strict=True):
        pictures = [picture[cut, cut] for picture in pictures]
        low, high = np.percentile(np.concatenate([p.ravel() for p in pictures]), [0.5, 99.8])
        for ax, picture, (across, up, along) in zip(row, pictures, ("xyz", "xzy", "yzx"), strict=True):
            ax.imshow(picture, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
            ax.set_title(f"{kind} along {along}", fontsize=10)
            ax.set_xlabel(f"{across} →", fontsize=9)
            ax.set_ylabel(f"{up} →", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            scale_bar(ax, picture.shape[-1], pixel_size)
    return figure


def scale_bar(ax: Axes, side: int, pixel_size: float, colour: str = "white", origin: tuple[float, float] = (0, 0)) -> None:
    """A bar of a round length, about a quarter of a picture of `side` px whose lower left corner is at `origin`."""
    length = max((d for d in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if d <= 0.3 * side * pixel_size), default=1)
    start, height = origin[0] + 0.05 * side, origin[1] + 0.06 * side
    ax.plot([start, start + length / pixel_size], [height, height], color=colour, linewidth=3, solid_capstyle="butt")
    ax.annotate(f"{length:g} Å", (start, height), (0, 4), textcoords="offset points", color=colour, fontsize=8)


@styled
def plot_spectra(noise: Mapping[str, tuple[Array, float]], tau2: Array | None, ssnr: Array | None, box: int, pixel_size: float) -> Figure:
    """Noise variance by optics group (name → (spectrum, box · pixel size in Å)) beside signal variance and signal-to-noise of the map."""
    figure, axes = new_figure(9, 3.6, 1, 2)
    left, right = axes[0]
    highest = 0.5 / pixel_size
    for colour, (name, (spectrum, side)) in zip(COLOURS, noise.items(), strict=False):
        left.semilogy(np.arange(1, len(spectrum)) / side, np.where(spectrum[1:] > 0, spectrum[1:], np.nan), color=colour, label=name)
    left.set_title("Noise of the images")
    left.set_ylabel("variance σ² per component")
    left.legend(fontsize=9)
    k = frequencies(box // 2 + 1, box, pixel_size)[1:]
    if ssnr is not None:
        right.semilogy(k, np.where(ssnr[1:] > 0, ssnr[1:], np.nan), color=COLOURS[2], label="signal to noise of the map")
        right.axhline(1, **LEVEL)
    if tau2 is not None and np.nanmax(tau2[1:]) > 0:
        share = np.where(tau2[1:] > 0, tau2[1:] / np.nanmax(tau2[1:]), np.nan)
        right.semilogy(k, share, color=COLOURS[3], label="signal variance τ², highest = 1")
    right.set_title("Signal of the map")
    right.set_ylabel("ratio")
    right.legend(fontsize=9)
    for ax in (left, right):
        resolution_axis(ax, highest)
    return figure
