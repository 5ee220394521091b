"""report.html of a refinement: what came out and whether to believe it, on one page that needs no other file.

Reads the run directory only: events.jsonl, job.json and whatever of RELION's files is there, so it can be made again at any
time, also of an unfinished run.
"""
from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from frazil.data import Volume
from frazil.io.files import write_text
from frazil.io.mrc import read_map
from frazil.io.star import Star, read_star
from frazil.jobs.html import document, picture, table, warnings, write_plots
from frazil.jobs.html import key_figures as figure_row
from frazil.jobs.plots import UNKNOWN, plot_directions, plot_fsc, plot_map, plot_progress, plot_spectra
from frazil.jobs.record import read_events, read_json
from frazil.jobs.run import spoken_time
from frazil.maths.fsc import corrected_fsc, resolution_at
from frazil.maths.masks import soft_sphere
from frazil.maths.symmetry import operators

Array = NDArray[Any]
MASK_EDGE = 5.0  # px, soft edge of the sphere that stands in for a mask
CAPTIONS = {
    "fsc": "Agreement of the two half maps, which never saw each other's particles. The masked curve must fall to zero like the others; "
           "where it stays up, the mask is too tight. The corrected curve subtracts what the mask alone brings.",
    "progress": "Resolution should fall and settle; changes of the poses should shrink below the sampling step.",
    "directions": "A few bright spots and empty areas mean preferred orientations: the map is then blurred in some "
                  "directions. Rows are tilt, columns rot.",
    "map": "Density along the three axes. Streaks or spikes towards the edge mean uneven directions or a box that is too small.",
    "spectra": "The noise should be smooth; peaks are detector or normalisation faults. The map holds signal up to where its "
               "signal-to-noise passes 1.",
}  # fmt: skip
TITLES = {
    "fsc": "Resolution",
    "map": "Map",
    "progress": "Course of the refinement",
    "directions": "Viewing directions",
    "spectra": "Spectra",
}
COLUMNS = (
    ("iteration", "iteration", "d"),
    ("resolution", "resolution / Å", ".2f"),
    ("current_size", "window / px", "d"),
    ("healpix_order", "order", "d"),
    ("accuracy_rotation", "accuracy / °", ".2f"),
    ("accuracy_shift", "accuracy / Å", ".2f"),
    ("changes_rotation", "change / °", ".2f"),
    ("changes_shift", "change / Å", ".2f"),
    ("pmax", "Pmax", ".3f"),
    ("seconds", "time / s", ".1f"),
)


@dataclass
class Findings:
    """What a run directory tells; everything may be missing."""

    name: str
    box: int = 0
    pixel_size: float = 0.0  # Å
    job: dict[str, Any] = field(default_factory=dict)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    curves: dict[str, Array] = field(default_factory=dict)
    model: Star = field(default_factory=Star)
    angles: Array | None = None  # (n, 2) rot, tilt in degrees
    map: Volume | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters the run was started with."""
        return self.job.get("parameters", {})


def refine3d_report(run_dir: Path) -> Path:
    """Write report.html and its plots (plots/*.png) into a refine3d run directory; returns the path of report.html."""
    found = gather(run_dir)
    pictures = write_plots(run_dir / "plots", draw(found))
    write_text(run_dir / "report.html", page(found, pictures))
    return run_dir / "report.html"


def gather(run_dir: Path) -> Findings:
    """Read what there is of a run."""
    events = read_events(run_dir)
    found = Findings(run_dir.resolve().name, job=read_json(run_dir / "job.json") or {})
    by_number = {e["iteration"]: e for e in events if e.get("event") == "iteration"}  # a repeated one after --resume replaces the first
    found.iterations = [by_number[i] for i in sorted(by_number)]
    found.warnings = list(dict.fromkeys(str(e.get("message", "")) for e in events if e.get("event") == "warning"))
    found.seconds = sum(e.get("seconds") or 0.0 for e in found.iterations)
    if (run_dir / "run_model.star").exists():
        found.model = read_star(run_dir / "run_model.star")
        general: Mapping[str, Any] = found.model["model_general"]  # pyright: ignore[reportAssignmentType] (a list block)
        found.box, found.pixel_size = int(general["rlnOriginalImageSize"]), float(general["rlnPixelSize"])
    if (run_dir / "run_class001.mrc").exists():
        found.map = read_map(run_dir / "run_class001.mrc")
        found.box, found.pixel_size = found.map.data.shape[-1], found.map.pixel_size
    if found.iterations and not found.pixel_size:  # not converged: no final files yet
        found.box, found.pixel_size = found.iterations[-1].get("box", 0), found.iterations[-1].get("pixel_size", 0.0)
    if (run_dir / "run_data.star").exists():
        particles = read_star(run_dir / "run_data.star")["particles"]
        found.angles = np.stack([np.asarray(particles[f"rlnAngle{a}"], dtype=float) for a in ("Rot", "Tilt")], -1)
    found.curves = curves(run_dir, found)
    return found


def curves(run_dir: Path, found: Findings) -> dict[str, Array]:
    """FSC curves by name: of the half maps where they are, unmasked, masked and corrected; else that of the last iteration."""
    halves = [run_dir / f"run_half{h}_class001_unfil.mrc" for h in (1, 2)]
    if all(path.exists() for path in halves):
        a, b = (read_map(path).data for path in halves)
        mask, name = solvent_mask(found, a.shape[-1])
        result = corrected_fsc(a, b, mask, 0)
        masked, corrected = result.masked.numpy(), result.corrected.numpy()
        return {"unmasked": result.unmasked.numpy(), f"masked ({name})": masked, "corrected for the mask": corrected}
    last = next((e["fsc"] for e in reversed(found.iterations) if e.get("fsc")), None)
    return {"between the half maps": np.array(last, dtype=float)} if last else {}


def solvent_mask(found: Findings, box: int) -> tuple[torch.Tensor, str]:
    """The mask the run was given, or a soft sphere of the particle's diameter; with its name."""
    given = found.parameters.get("mask")
    path = Path(given) if given else None
    if path and not path.is_absolute():
        path = Path(found.job.get("directory", "")) / path
    if path and path.exists():
        return read_map(path).data, path.name
    diameter = float(found.parameters.get("diameter") or 0)
    diameter = diameter if diameter > 0 else 0.84 * box * found.pixel_size  # -1: the whole box
    radius = min(diameter / (2 * found.pixel_size), box / 2 - MASK_EDGE)
    return soft_sphere(box, radius, MASK_EDGE), f"sphere of {2 * radius * found.pixel_size:.0f} Å"


def draw(found: Findings) -> dict[str, Figure]:
    """The figures that can be made of what was found."""
    figures = {}
    if found.curves:
        figures["fsc"] = plot_fsc(found.curves, found.box, found.pixel_size, final_resolution(found))
    if found.map is not None:
        figures["map"] = plot_map(found.map.data.numpy(), found.pixel_size, float(found.parameters.get("diameter") or 0))
    if found.iterations and found.box:
        figures["progress"] = plot_progress(found.iterations, found.box, found.pixel_size)
    if found.angles is not None:
        group = str(found.parameters.get("symmetry", "C1"))
        figures["directions"] = plot_directions(found.angles[:, 0], found.angles[:, 1], operators(group).numpy(), group)
    noise, table = noise_spectra(found), found.model.get("model_class_1")
    if noise and found.box:
        spectrum = [None if table is None else np.asarray(table[label], dtype=float) for label in ("rlnReferenceTau2", "rlnSsnrMap")]
        figures["spectra"] = plot_spectra(noise, spectrum[0], spectrum[1], found.box, found.pixel_size)
    return figures


def noise_spectra(found: Findings) -> dict[str, tuple[Array, float]]:
    """Optics group → (noise spectrum, side of its box in Å)."""
    out = {}
    for name, block in found.model.items():
        if name.startswith("model_optics_group_"):
            spacing = np.asarray(block["rlnResolution"], dtype=float)
            side = 1 / spacing[1] if len(spacing) > 1 and spacing[1] > 0 else found.box * found.pixel_size
            out[f"optics group {name.rsplit('_', 1)[1]}"] = (np.asarray(block["rlnSigma2Noise"], dtype=float), float(side))
    return out


def final_resolution(found: Findings) -> float | None:
    """Resolution in Å: where the unmasked (or only) curve first falls below 0.143."""
    if not found.curves:
        return None
    curve = torch.from_numpy(np.asarray(next(iter(found.curves.values())), dtype=float))
    return float(resolution_at(curve, 0.143, found.box, found.pixel_size))


def key_figures(found: Findings) -> list[tuple[str, str]]:
    """(value, what it is) of the numbers a person looks for first."""
    last: Mapping[str, Any] = found.iterations[-1] if found.iterations else {}
    out = []
    for name, curve in found.curves.items():
        d = float(resolution_at(torch.from_numpy(np.asarray(curve, dtype=float)), 0.143, found.box, found.pixel_size))
        out.append((f"{d:.2f} Å", f"FSC 0.143, {name}"))
    if found.angles is not None:
        out.append((f"{len(found.angles):,}", "particles"))
    for key, unit, what in (("accuracy_rotation", "°", "accuracy of angles"), ("accuracy_shift", " Å", "accuracy of shifts")):
        value = next((e[key] for e in reversed(found.iterations) if e.get(key) is not None and e[key] < UNKNOWN), None)
        if value is not None:
            out.append((f"{value:.2f}{unit}", what))
    if last.get("pmax") is not None:
        out.append((f"{last['pmax']:.2f}", "mean peak probability"))
    if found.iterations:
        out.append((str(last["iteration"]), "iterations"))
    if found.seconds:
        out.append((spoken_time(found.seconds), "in iterations"))
    return out


def iteration_rows(found: Findings) -> list[list[str]]:
    """A row an iteration for the table under the plots."""
    return [["–" if row.get(key) is None else format(row[key], style) for key, _, style in COLUMNS] for row in found.iterations]


def page(found: Findings, pictures: Mapping[str, bytes]) -> str:
    """The HTML text."""
    parts = [f"<h1>{html.escape(found.name)}</h1><span>refine3d, {html.escape(str(found.job.get('created', 'start unknown')))}</span>"]
    parts += [figure_row(key_figures(found)), *warnings(found.warnings)]
    parts += [picture(title, pictures[name], CAPTIONS[name]) for name, title in TITLES.items() if name in pictures]
    if found.iterations:
        parts.append("<h2>Iterations</h2>" + table(iteration_rows(found), [head for _, head, _ in COLUMNS]))
    if found.parameters:
        rows = {**found.parameters, **{key: found.job.get(key) for key in ("seed", "device")}}
        shown = [(key, "–" if value is None else value) for key, value in rows.items()]
        parts.append("<h2>Parameters</h2>" + table(shown, ("parameter", "value")))
    made = f"frazil {found.job.get('version', '')} {str(found.job.get('commit') or '')[:12]} on {found.job.get('host', 'an unknown host')}"
    parts.append(f"<footer>{html.escape(made)}</footer>")
    return document(f"{found.name}: refine3d", parts)
