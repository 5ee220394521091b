"""Plots and report.html of motion correction: tracks, motion frame by frame, movies that stand out."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from frazil.data import BadInput
from frazil.io.movie_table import MotionRecord, read_motion
from frazil.jobs.pages import Picture, write_page
from frazil.jobs.plots import COLOURS, new_figure, styled
from frazil.jobs.record import read_events
from frazil.jobs.run import Run
from frazil.maths.motion import local_shift

SHOWN = 24  # tracks drawn one by one: the movies that moved most
MARGINS = (0.75, 0.55, 0.15, 0.15)  # inches around a plot with labels of ordinary size
OUTLIER = 4.0  # robust standard deviations of log motion from which a movie is flagged
CAPTIONS = {
    "tracks": "The movies that moved most. Black: the whole frame from first (dot) to last; colours: local motion at the corners and "
    "the middle of the "
              "field, added. A good track is smooth; single jumps are frames that were not aligned.",
    "frames": "Shift from one frame to the next. It is largest in the first frames and falls; a rise in the middle is a stage that "
    "moves, a flat line at "
              "the level of the expected error a specimen at rest.",
    "motion": "Path length of each movie in the order of the table. Flagged movies (red) moved far more than the others: look at them, "
    "and leave "
              "them out if their power spectra show few rings.",
}  # fmt: skip


def flags(total: np.ndarray) -> np.ndarray:
    """(n,) bool of movies whose motion is far above the others': OUTLIER robust sd of its logarithm above the median."""
    log = np.log(np.maximum(total, 1e-3))
    spread = 1.4826 * np.median(np.abs(log - np.median(log)))
    return (log - np.median(log) > OUTLIER * max(spread, 0.1)) if len(total) >= 5 else np.zeros(len(total), bool)


def write_report(run: Run, motion: pd.DataFrame, failed: Mapping[str, str]) -> Path:
    """plots/*.png and report.html; `motion` is the table of corrected_micrographs.star, `failed` name → reason."""
    total = motion["rlnAccumMotionTotal"].to_numpy(dtype=float)
    flagged = flags(total)
    order = np.argsort(-total)[:SHOWN]
    records: dict[str, MotionRecord] = {}
    for index in order:
        path = Path(motion["rlnMicrographMetadata"].iloc[index])
        try:
            records[path.stem] = read_motion(path)
        except BadInput:
            continue
    events = list({e["movie"]: e for e in read_events(run.path) if e.get("event") == "movie"}.values())  # of one done again the last
    warnings = [f"left out: {reason}" for reason in failed.values()]
    warnings += [f"{motion['rlnMicrographName'].iloc[i]}: moved {total[i]:.1f} Å, median {np.median(total):.1f} "
        f"Å" for i in np.flatnonzero(flagged)]
    warnings += [f"{e['movie']}: {note}" for e in events for note in e.get("notes", [])][:50]
    numbers = [(f"{len(motion)}", "movies corrected"), (f"{len(failed)}", "left out"), (f"{np.median(total):.1f} Å", "median motion")]
    if events:
        numbers.append((f"{np.median([e['seconds'] for e in events]):.1f} s", "a movie"))
        errors = [e["error_px"] for e in events if e.get("error_px") is not None]
        numbers.append((f"{np.median(errors):.2f} px" if errors else "–", "expected error of a track"))
    pictures = [
        Picture("tracks", "Tracks", CAPTIONS["tracks"], plot_tracks(records)),
        Picture("frames", "Motion by frame", CAPTIONS["frames"], plot_frames(records)),
        Picture("motion", "Motion by movie", CAPTIONS["motion"], plot_motion(motion, flagged)),
    ]
    return write_page(run, numbers, warnings, pictures)


def _pixel(record: MotionRecord) -> float:
    return float(record.general["rlnMicrographOriginalPixelSize"])


@styled
def plot_tracks(records: Mapping[str, MotionRecord]) -> Figure:
    """A small panel a movie, in Å."""
    columns = min(4, max(1, len(records)))
    rows = max(1, -(-len(records) // columns))
    figure, axes = new_figure(2.9 * columns, 2.7 * rows, rows, columns, (0.6, 0.5, 0.15, 0.3))
    import torch

    corners = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.9, 0.9]], dtype=torch.float64)
    for ax in axes.flat[len(records) :]:
        ax.set_visible(False)
    for ax, (name, record) in zip(axes.flat, records.items(), strict=False):
        track = (record.track * _pixel(record)).numpy()
        if record.coefficients is not None:
            local = (local_shift(record.coefficients, len(record.track), corners) * _pixel(record)).numpy()
            for p in range(len(corners)):
                ax.plot(*(track + local[:, p]).T, color=COLOURS[p], linewidth=0.9)
        seen = record.observed.numpy()
        ax.plot(*track[seen].T, color="#1f2933", linewidth=1.4)
        ax.plot(*track[seen][0], "o", color="#1f2933", markersize=4)
        ax.set_title(name if len(name) <= 28 else "…" + name[-27:], fontsize=7)
        ax.tick_params(labelsize=7)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel("x / Å", fontsize=7)
        ax.set_ylabel("y / Å", fontsize=7)
    return figure


@styled
def plot_frames(records: Mapping[str, MotionRecord]) -> Figure:
    """Steps between frames in Å: each movie thin, the median thick."""
    figure, axes = new_figure(7, 3.6, margins=MARGINS)
    ax = axes[0, 0]
    steps = [(r.track[1:] - r.track[:-1]).norm(dim=-1).numpy() * _pixel(r) for r in records.values()]
    for one in steps:
        ax.plot(np.arange(2, len(one) + 2), one, color="#9fb3c8", linewidth=0.7)
    longest = max((len(one) for one in steps), default=0)
    if longest:
        middle = [np.median([one[i] for one in steps if len(one) > i]) for i in range(longest)]
        ax.plot(np.arange(2, longest + 2), middle, color=COLOURS[0], label="median")
        ax.legend(fontsize=9)
    ax.set_xlabel("frame")
    ax.set_ylabel("shift from the frame before / Å")
    ax.set_ylim(bottom=0)
    return figure


@styled
def plot_motion(motion: pd.DataFrame, flagged: np.ndarray) -> Figure:
    """Path length a movie: all, and its early part."""
    figure, axes = new_figure(7, 3.4, margins=MARGINS)
    ax = axes[0, 0]
    number = np.arange(1, len(motion) + 1)
    total, early = (motion[f"rlnAccumMotion{part}"].to_numpy(dtype=float) for part in ("Total", "Early"))
    ax.plot(number, total, "o", markersize=3, color=COLOURS[0], label="whole exposure")
    ax.plot(number, early, "o", markersize=3, color=COLOURS[3], label="first 4 e/Å²")
    ax.plot(number[flagged], total[flagged], "o", markersize=5, color=COLOURS[1], label="flagged")
    ax.set_xlabel("movie")
    ax.set_ylabel("path length / Å")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9)
    return figure
