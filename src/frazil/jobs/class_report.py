"""report.html of a classification: what the classes are, how many particles each has, and how they came about.

Reads the run directory only: events.jsonl, job.json and the maps of the last iteration written, so it can be made again at any time.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from frazil.io.files import atomic_path, write_text
from frazil.io.mrc import read_map
from frazil.io.star import read_star
from frazil.jobs.class_plots import plot_class_slices, plot_classes, plot_course
from frazil.jobs.class_sheet import sheet_of_run
from frazil.jobs.html import document, key_figures, picture, table, warnings, write_plots
from frazil.jobs.plots import UNKNOWN, plot_directions
from frazil.jobs.record import read_events, read_json
from frazil.jobs.run import spoken_time
from frazil.maths.symmetry import operators

CAPTIONS = {
    "averages": "Class averages, largest class first: number, particles, resolution. Good ones show a particle with structure inside and "
                "flat solvent; junk is a blob, a ring, a streak or noise. Also in classes.png.",
    "slices": "Central slices of the maps, largest class first, all on one grey scale. Good classes look like the particle and end in flat "
              "solvent; a class of junk is a blob, a ring or streaks.",
    "classes": "Share of the particles and resolution of every class by iteration. They should settle; the resolution is where a map's own "
               "signal-to-noise passes 1, so it depends on --tau-fudge and is no gold standard.",
    "course": "Fewer particles should change class with every iteration, and changes of the poses fall below the sampling step.",
    "directions": "Where the particles of the largest class were seen from. A few bright spots: it may be a view, not a structure.",
}  # fmt: skip
TITLES = {
    "averages": "Class averages", "slices": "Maps", "classes": "Classes", "course": "Course of the classification",
    "directions": "Viewing directions",
}  # fmt: skip
COLUMNS = (
    ("iteration", "iteration", "d"), ("resolution", "best resolution / Å", ".2f"), ("current_size", "window / px", "d"),
    ("accuracy_rotation", "accuracy / °", ".2f"), ("accuracy_shift", "accuracy / Å", ".2f"), ("changes_rotation", "change / °", ".2f"),
    ("changes_shift", "change / Å", ".2f"), ("changes_class", "changed class", ".1%"), ("pmax", "Pmax", ".3f"),
    ("seconds", "time / s", ".1f"),
)  # fmt: skip


def class_report(run_dir: Path) -> Path:
    """Write report.html and its plots (plots/*.png) into the directory of a class3d run; returns the path of report.html."""
    job = read_json(run_dir / "job.json") or {}
    events = read_events(run_dir)
    by_number = {e["iteration"]: e for e in events if e.get("event") == "iteration"}  # a repeated one after --resume replaces the first
    iterations = [by_number[i] for i in sorted(by_number)]
    lines = list(dict.fromkeys(str(e.get("message", "")) for e in events if e.get("event") == "warning"))
    pictures = write_plots(run_dir / "plots", draw(run_dir, job, iterations))
    if "averages" in pictures:  # what users look at lies beside the page
        with atomic_path(run_dir / "classes.png") as temporary:
            temporary.write_bytes(pictures["averages"])
    parts = [f"<h1>{run_dir.resolve().name}</h1><span>{job.get('job', '')}, {job.get('created', 'start unknown')}</span>"]
    if iterations:
        parts.append(key_figures(numbers(iterations)))
    parts += warnings(lines)
    parts += [picture(title, pictures[name], CAPTIONS[name]) for name, title in TITLES.items() if name in pictures]
    if iterations:
        parts.append("<h2>Classes</h2>" + table(class_rows(iterations[-1]), ("class", "particles", "share", "resolution / Å", "accuracy")))
        rows = [["–" if unknown(row.get(key)) else format(row[key], style) for key, _, style in COLUMNS] for row in iterations]
        parts.append("<h2>Iterations</h2>" + table(rows, [head for _, head, _ in COLUMNS]))
    settings = {**job.get("parameters", {}), "seed": job.get("seed"), "device": job.get("device")}
    parts.append("<h2>Parameters</h2>" + table([(k, "–" if v is None else v) for k, v in settings.items()], ("parameter", "value")))
    made = f"frazil {job.get('version', '')} {str(job.get('commit') or '')[:12]} on {job.get('host', 'an unknown host')}"
    parts.append(f"<footer>{made}</footer>")
    write_text(run_dir / "report.html", document(f"{run_dir.resolve().name}: {job.get('job', 'class3d')}", parts))
    return run_dir / "report.html"


def unknown(value: Any) -> bool:
    """Whether a recorded number says nothing."""
    return value is None or value >= UNKNOWN


def numbers(iterations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(value, what it is) of the numbers a person looks for first."""
    last = iterations[-1]
    out = [(f"{last['resolution']:.2f} Å", "best class (own SSNR = 1)"), (f"{100 * max(last['occupancy']):.1f} %", "in the largest class")]
    out.append((f"{sum(last['class_counts']):,}", "particles"))
    out.append((f"{100 * last['changes_class']:.1f} %", "changed class at last"))
    for key, unit, what in (("accuracy_rotation", "°", "accuracy of angles"), ("accuracy_shift", " Å", "accuracy of shifts")):
        if not unknown(last.get(key)):
            out.append((f"{last[key]:.2f}{unit}", what))
    out.append((str(last["iteration"]), "iterations"))
    return [*out, (spoken_time(sum(row.get("seconds") or 0.0 for row in iterations)), "in iterations")]


def class_rows(last: dict[str, Any]) -> list[list[str]]:
    """A row a class, largest first."""
    order = np.argsort(last["occupancy"])[::-1]
    rows = []
    for k in order.tolist():
        rotation, shift = last["class_accuracy"][k]
        accuracy = "–" if unknown(rotation) else f"{rotation:.1f}°, {shift:.1f} Å"
        share = f"{100 * last['occupancy'][k]:.1f} %"
        rows.append([str(k + 1), f"{last['class_counts'][k]:,}", share, found_resolution(last, k), accuracy])
    return rows


def found_resolution(last: dict[str, Any], k: int) -> str:
    """Resolution of a class in Å as text, "empty" where its map is zero."""
    value = last["class_resolution"][k]
    return "empty" if value is None or not last["occupancy"][k] > 0 else f"{value:.1f}"


def last_maps(run_dir: Path) -> list[Path]:
    """Maps of the last iteration written, by class."""
    found = [path for path in run_dir.glob("run_it*_class*.mrc") if re.fullmatch(r"run_it\d{3,}_class\d{3,}\.mrc", path.name)]
    latest = max((path.name.split("_")[1] for path in found), default="")
    return sorted(path for path in found if path.name.split("_")[1] == latest)


def draw(run_dir: Path, job: dict[str, Any], iterations: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures that can be made of what there is."""
    figures: dict[str, Figure] = {}
    if not iterations:
        return figures
    last, settings = iterations[-1], job.get("parameters", {})
    if maps := last_maps(run_dir):
        order = np.argsort(last["occupancy"][: len(maps)])[::-1][:12].tolist()
        volumes = [read_map(maps[k]) for k in order]
        found = [found_resolution(last, k) for k in order]
        shares = [f"class {k + 1}: {100 * last['occupancy'][k]:.1f} %" for k in order]
        titles = [f"{share}, {text}" + " Å" * (text != "empty") for share, text in zip(shares, found, strict=True)]
        arrays, diameter = [v.data.numpy() for v in volumes], float(settings.get("diameter") or 0)
        figures["slices"] = plot_class_slices(arrays, titles, volumes[0].pixel_size, diameter)
    if sheet := sheet_of_run(run_dir, last, float(settings.get("diameter") or 0)):
        figures["averages"] = sheet
    figures["classes"] = plot_classes(iterations)
    figures["course"] = plot_course(iterations)
    if maps and (run_dir / "run_data.star").exists():
        particles = read_star(run_dir / "run_data.star")["particles"]
        mine = np.asarray(particles["rlnClassNumber"], dtype=int) == 1 + int(np.argmax(last["occupancy"]))
        rot, tilt = (np.asarray(particles[f"rlnAngle{a}"], dtype=float)[mine] for a in ("Rot", "Tilt"))
        group = str(settings.get("symmetry", "C1"))
        figures["directions"] = plot_directions(rot, tilt, operators(group).numpy(), group)
    return figures
