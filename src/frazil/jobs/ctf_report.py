"""Plots and report.html of a CTF run: defocus, astigmatism and resolution in the order of the table, micrographs that stand out."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frazil.jobs.pages import Picture, write_page
from frazil.jobs.plots import COLOURS, new_figure, styled
from frazil.jobs.run import Run

OUTLIER = 4.0  # robust standard deviations from the median from which a micrograph is flagged
LISTED = 60  # lines of warnings on the page
MARGINS = (0.8, 0.55, 0.15, 0.3)  # inches around a plot
CAPTIONS = {
    "defocus": "Mean defocus of each micrograph in the order of the table, which is that of time. The defocus asked for shows as steps; "
               "a drift is the stage or the lenses; single points far off are focusing errors or wrong fits: look at their pictures "
               "(…_ctf.png).",
    "resolution": "Resolution to which rings are fitted (left, finer is higher) and figure of merit (right). A slow loss is ice growing "
                  "or a drifting stage. Flagged (red): far from the others, or with a line above.",
    "astigmatism": "Left: astigmatism as a vector, |U − V| long at twice its angle: a tight cloud is a microscope that stays as it is; "
                   "its distance from the middle is what can be tuned away. Right: resolution against defocus.",
    "ice": "Height of the ice ring at 3.7 Å above its surroundings (left) and tilt of the field as its defocus shows it (right).",
}  # fmt: skip


def outliers(values: np.ndarray, least: float, *, both: bool = False) -> np.ndarray:
    """(n,) bool: above the median by OUTLIER robust standard deviations (at least `least` each); with `both` also below. None among < 5."""
    live = np.isfinite(values)
    if live.sum() < 5:
        return np.zeros(len(values), bool)
    middle = np.median(values[live])
    spread = max(1.4826 * float(np.median(np.abs(values[live] - middle))), least)
    away = np.nan_to_num((values - middle) / spread)
    return (np.abs(away) if both else away) > OUTLIER


def flags_of(table: pd.DataFrame, values: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """What stands out of each micrograph: found by itself, or in comparison with the others."""
    out = [[] if str(v["frazilFlags"]) == "none" else str(v["frazilFlags"]).split("; ") for v in values.values()]
    defocus, astigmatism, resolution = _columns(table)
    told = (
        (outliers(np.log(np.maximum(defocus, 1.0)), 0.25, both=True), lambda i: f"defocus {defocus[i] / 1e4:.2f} µm, far from the others"),
        (outliers(astigmatism, 60.0), lambda i: f"astigmatism {astigmatism[i]:.0f} Å, far above the others"),
        (outliers(resolution, 0.3), lambda i: f"rings to {resolution[i]:.1f} Å only"),
    )
    for which, said in told:
        for i in np.flatnonzero(which):
            out[i].append(said(i))
    return out


def _columns(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean defocus, |U − V| and resolution in Å."""
    u, v, resolution = (table[label].to_numpy(dtype=float) for label in ("rlnDefocusU", "rlnDefocusV", "rlnCtfMaxResolution"))
    return 0.5 * (u + v), np.abs(u - v), resolution


def write_report(run: Run, table: pd.DataFrame, values: Mapping[int, Mapping[str, Any]], lost: Mapping[str, str]) -> int:
    """plots/*.png and report.html; returns how many micrographs are flagged.

    `values`: data_ctf of each row of `table`; `lost`: name → reason.
    """
    told = flags_of(table, values)
    flagged = np.array([bool(t) for t in told])
    warnings = [f"left out: {name}: {reason}" if name not in reason else f"left out: {reason}" for name, reason in lost.items()]
    warnings += [f"{name}: {'; '.join(t)}" for name, t in zip(table["rlnMicrographName"], told, strict=True) if t]
    for line in warnings:
        run.event("flag", message=line)
    if len(warnings) > LISTED:
        warnings = [*warnings[:LISTED], f"… and {len(warnings) - LISTED} more: events.jsonl has all"]
    defocus, astigmatism, resolution = _columns(table)
    numbers = [(f"{len(table)}", "micrographs with a CTF"), (f"{len(lost)}", "left out"), (f"{int(flagged.sum())}", "flagged"),
               (f"{np.median(defocus) / 1e4:.2f} µm", "median defocus"), (f"{np.median(astigmatism):.0f} Å", "median astigmatism"),
               (f"{np.median(resolution):.1f} Å", "median resolution of the rings")]  # fmt: skip
    ice = table["rlnCtfIceRingDensity"].to_numpy(dtype=float)
    tilt = np.array([float(v["frazilTilt"]) for v in values.values()])
    pictures = [
        Picture("defocus", "Defocus", CAPTIONS["defocus"], plot_defocus(table, flagged)),
        Picture("resolution", "Resolution", CAPTIONS["resolution"], plot_resolution(table, flagged)),
        Picture("astigmatism", "Astigmatism", CAPTIONS["astigmatism"], plot_astigmatism(table, flagged)),
        Picture("ice", "Ice and tilt", CAPTIONS["ice"], plot_ice(ice, tilt, flagged)),
    ]
    write_page(run, numbers, warnings, pictures)
    return int(flagged.sum())


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, flagged: np.ndarray, label: str) -> None:
    """Dots, the flagged ones red."""
    size = 3 if len(x) > 200 else 4
    ax.plot(x[~flagged], y[~flagged], "o", markersize=size, color=COLOURS[0])
    ax.plot(x[flagged], y[flagged], "o", markersize=size + 1, color=COLOURS[1], label="flagged")
    ax.set_ylabel(label)
    if flagged.any():
        ax.legend(fontsize=9)


@styled
def plot_defocus(table: pd.DataFrame, flagged: np.ndarray) -> Figure:
    """Mean defocus in the order of the table, and the phase shift where there is one."""
    phase = "rlnPhaseShift" in table
    figure, axes = new_figure(8, 5 if phase else 3.4, 2 if phase else 1, margins=MARGINS)
    number = np.arange(1, len(table) + 1)
    _points(axes[0, 0], number, _columns(table)[0] / 1e4, flagged, "defocus / µm")
    if phase:
        _points(axes[1, 0], number, table["rlnPhaseShift"].to_numpy(dtype=float), flagged, "phase shift / °")
    axes[-1, 0].set_xlabel("micrograph")
    return figure


@styled
def plot_resolution(table: pd.DataFrame, flagged: np.ndarray) -> Figure:
    """Resolution of the rings and figure of merit in the order of the table."""
    figure, axes = new_figure(9, 3.4, 1, 2, MARGINS)
    number = np.arange(1, len(table) + 1)
    _points(axes[0, 0], number, _columns(table)[2], flagged, "resolution / Å")
    axes[0, 0].invert_yaxis()
    _points(axes[0, 1], number, table["rlnCtfFigureOfMerit"].to_numpy(dtype=float), flagged, "figure of merit")
    for ax in axes[0]:
        ax.set_xlabel("micrograph")
    return figure


@styled
def plot_astigmatism(table: pd.DataFrame, flagged: np.ndarray) -> Figure:
    """Astigmatism as a vector; resolution against defocus."""
    figure, axes = new_figure(9, 4, 1, 2, MARGINS)
    defocus, astigmatism, resolution = _columns(table)
    twice = np.radians(2 * table["rlnDefocusAngle"].to_numpy(dtype=float))
    ax = axes[0, 0]
    _points(ax, astigmatism * np.cos(twice), astigmatism * np.sin(twice), flagged, "|U − V| sin 2α / Å")
    ax.set_xlabel("|U − V| cos 2α / Å")
    reach = 1.1 * max(float(astigmatism.max()), 100.0)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    _points(axes[0, 1], defocus / 1e4, resolution, flagged, "resolution / Å")
    axes[0, 1].set_xlabel("defocus / µm")
    axes[0, 1].invert_yaxis()
    return figure


@styled
def plot_ice(ice: np.ndarray, tilt: np.ndarray, flagged: np.ndarray) -> Figure:
    """Ice ring and tilt in the order of the table."""
    figure, axes = new_figure(9, 3.4, 1, 2, MARGINS)
    number = np.arange(1, len(ice) + 1)
    _points(axes[0, 0], number, ice, flagged, "ice ring density")
    if np.isfinite(tilt).any():
        _points(axes[0, 1], number, tilt, flagged, "tilt / °")
    else:
        axes[0, 1].set_title("tilt: not known from saved spectra", fontsize=9)
    for ax in axes[0]:
        ax.set_xlabel("micrograph")
    return figure

