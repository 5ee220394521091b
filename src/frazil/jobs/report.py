"""`frazil report`: the validation of a whole project on one page, with the table that journals ask for."""
from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

import frazil
from frazil.data import BadInput
from frazil.io.files import write_text
from frazil.io.mrc import read_map
from frazil.jobs.html import document, key_figures, picture, png, table, warnings
from frazil.jobs.model_fsc import plot_q_scores
from frazil.jobs.plots import COLOURS, new_figure, plot_directions, plot_fsc, plot_map, styled
from frazil.jobs.record import now
from frazil.jobs.report_facts import FSC_LABELS, MODEL_LABELS, Facts, inputs_of, read_run
from frazil.jobs.run import Run, spoken_time
from frazil.maths.symmetry import operators

POSITIONAL = ("runs",)
HAS_RUN_DIRECTORY = False
UNKNOWN = "–"
TOLD: JsonDict = {"level": "expert"}
CAPTIONS = {
    "FSC of the half maps": "Two halves of the particles, refined apart. The curve with randomised phases is what the mask alone brings; "
                            "the corrected one is what counts.",
    "Map against model": "FSC-work (the half the model was refined in) and FSC-free (the other) should run together.",
    "Viewing directions": "Few bright spots and empty areas mean preferred orientations.",
    "Local resolution": "Voxels inside the mask.",
    "Map": "Central slices and projections.",
    "Q-scores": "How well each residue is resolved; 1 is like a well-resolved atom.",
}  # fmt: skip


class Params(BaseModel):
    """Collect runs (refine3d, postprocess, localres, model-fsc … of frazil or RELION) into one HTML page with Table 1 of cryo-EM papers.

    What no file tells can be given by the options below; what neither tells is left open in the table.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    runs: tuple[Path, ...] = Field(description="directories of the runs of the project", min_length=1)
    output: Path = Field(description="page to write (.html); the table goes beside it as .csv")
    title: str = Field("", description="title of the page")
    magnification: str = Field("", description="for the table", json_schema_extra=TOLD)
    exposure: float | None = Field(None, gt=0, description="total exposure, for the table", json_schema_extra={"unit": "e/Å²", **TOLD})
    initial_particles: int | None = Field(None, gt=0, description="particles picked, for the table", json_schema_extra=TOLD)
    emdb: str = Field("", description="EMDB code, for the table", json_schema_extra=TOLD)
    pdb: str = Field("", description="PDB code, for the table", json_schema_extra=TOLD)


@dataclass(frozen=True)
class Structure:
    """One map of the project: a column of the table."""

    name: str
    runs: tuple[Facts, ...]  # upstream first

    @property
    def values(self) -> dict[str, Any]:
        """Figures of all its runs: of two that tell the same thing the later; the particles it started from are the most there were."""
        merged: dict[str, Any] = {}
        for facts in self.runs:
            merged |= facts.values
        counts = [facts.values[key] for facts in self.runs for key in ("particles_in", "particles") if key in facts.values]
        if "particles_in" in merged:
            merged["particles_in"] = max(counts)
        return merged

    def last(self, name: str) -> Any:
        """The last of its runs' values of an attribute that is there."""
        return next((getattr(f, name) for f in reversed(self.runs) if getattr(f, name) is not None), None)


def structures(runs: Sequence[Facts]) -> list[Structure]:
    """The columns: each post-processed map and each refinement that was not, with what they were made from and what used them."""
    feeds = {i: {j for j, a in enumerate(runs) if j != i and _made_from(b, a)} for i, b in enumerate(runs)}

    def above(i: int, seen: frozenset[int] = frozenset()) -> set[int]:
        """All runs that i was made from."""
        out: set[int] = set()
        for j in feeds[i] - seen:
            out |= {j} | above(j, seen | {i, j})
        return out

    final = [i for i, f in enumerate(runs) if f.kind == "postprocess"]
    processed = set().union(*(above(i) for i in final)) if final else set()
    final += [i for i, f in enumerate(runs) if f.kind == "refine3d" and i not in processed]
    if len(final) < 2:
        order = sorted(range(len(runs)), key=lambda i: (len(above(i)), i))
        name = runs[final[0]].path.resolve().name if final else "project"
        return [Structure(name, tuple(runs[i] for i in order))]
    out = []
    for i in final:
        own = {i} | {j for j in above(i) if runs[j].kind in ("refine3d", "mask")}
        users = [j for j in range(len(runs)) if runs[j].kind not in ("postprocess", "refine3d") and above(j) & own]
        members = [*sorted(above(i), key=lambda j: (len(above(j)), j)), i, *(j for j in users if j not in above(i))]
        out.append(Structure(runs[i].path.resolve().name, tuple(runs[j] for j in members)))
    return out


def _made_from(run: Facts, source: Facts) -> bool:
    """Whether an input of `run` lies in the directory of `source`."""
    folder = source.path.resolve()
    return any(path.is_relative_to(folder) for path in inputs_of(run))


def number(value: Any, style: str = "g", unit: str = "") -> str:
    """A figure for a cell: a number, a range, several values, or a dash."""
    if value is None or value == [] or value == "":
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        joint = " – " if isinstance(value, tuple) else ", "
        return joint.join(format(x, style) for x in value) + unit
    return format(value, style) + unit


def table_one(values: Mapping[str, Any], params: Params) -> list[tuple[str, str, str]]:
    """(section, row, cell) of Table 1 for one structure."""
    v = values.get
    compared = "masked, corrected" if v("resolution") else "unmasked" if v("unmasked_resolution") else UNKNOWN
    data, refinement, model = "Data collection and processing", "Reconstruction", "Model"
    rows = [
        (data, "EMDB code", params.emdb or UNKNOWN),
        (data, "Magnification", params.magnification or UNKNOWN),
        (data, "Voltage (kV)", number(v("voltage"))),
        (data, "Spherical aberration (mm)", number(v("cs"))),
        (data, "Electron exposure (e⁻/Å²)", number(params.exposure or v("exposure"), ".1f")),
        (data, "Defocus range (µm, underfocus)", number(v("defocus"), ".2f")),
        (data, "Pixel size (Å)", number(v("detector_pixel") or v("pixel_size"), ".4g")),
        (data, "Pixel size of the map (Å)", number(v("pixel_size"), ".4g")),
        (data, "Micrographs", number(v("micrographs"), ",d")),
        (data, "Initial particle images", number(params.initial_particles or v("particles_in"), ",d")),
        (data, "Final particle images", number(v("particles"), ",d")),
        (refinement, "Symmetry imposed", number(v("symmetry"))),
        (refinement, "Map resolution (Å), FSC 0.143", number(v("resolution") or v("unmasked_resolution"), ".2f")),
        (refinement, "  half maps compared", compared),
        (refinement, "Map resolution range (Å), 1st to 99th percentile", number(v("local_range"), ".1f")),
        (refinement, "Map sharpening B-factor (Å²)", number(v("b_factor"), ".0f")),
        (model, "PDB code", params.pdb or UNKNOWN),
        (model, "Initial model used", number(v("initial_model"))),
        (model, "Model resolution (Å), FSC 0.5", number(v("model_resolution"), ".2f")),
        (model, "  FSC-work, FSC-free (Å)", number([x for x in (v("work_resolution"), v("free_resolution")) if x], ".2f")),
        (model, "Map correlation, in the mask", number(v("model_correlation"), ".2f")),
        (model, "Mean Q-score", number(v("q_score"), ".2f")),
        (model, "Non-hydrogen atoms", number(v("model_atoms"), ",d")),
    ]
    for kind, name in (("protein", "Protein residues"), ("nucleic", "Nucleotides"), ("ligand", "Ligands"), ("water", "Waters")):
        rows.append((model, name, number(v(f"model_{kind}_residues"), ",d")))
    for kind in ("protein", "nucleic", "ligand"):
        rows.append((model, f"Mean B-factor (Å²), {kind}", number(v(f"model_{kind}_b_factor"), ".1f")))
    for name in ("R.m.s. deviations, bonds (Å)", "R.m.s. deviations, angles (°)", "MolProbity score", "Clashscore", "Poor rotamers (%)",
                 "Ramachandran favoured / allowed / outliers (%)"):  # fmt: skip
        rows.append((model, name, UNKNOWN))
    return rows


def curves_of(rows: pd.DataFrame, labels: Mapping[str, str]) -> tuple[dict[str, Any], int, float]:
    """(curves by name, box, pixel size) of a table of FSC curves by shell."""
    shells = len(rows)
    spacing = float(rows["rlnResolution"].iloc[-1]) / (shells - 1)
    box = 2 * (shells - 1)
    return {name: rows[label].to_numpy(dtype=float) for name, label in labels.items() if label in rows}, box, 1 / (spacing * box)


@styled
def plot_local_resolution(values: Any) -> Figure:
    """Histogram of local resolutions (Å) between the 0.5th and 99.5th percentile."""
    figure, axes = new_figure(7, 3)
    low, high = np.percentile(values, (0.5, 99.5))
    axes[0, 0].hist(values, bins=60, range=(float(low), float(max(high, low + 0.1))), color=COLOURS[0])
    axes[0, 0].axvline(float(np.median(values)), color=COLOURS[1], linestyle=":")
    axes[0, 0].set_xlabel(f"local resolution / Å (median {np.median(values):.2f})")
    axes[0, 0].set_ylabel("voxels")
    return figure


def figures_of(structure: Structure) -> dict[str, Figure]:
    """The plots that can be made of a structure, by title."""
    values, out = structure.values, {}
    if (rows := structure.last("fsc")) is not None:
        curves, box, pixel_size = curves_of(rows, FSC_LABELS)
        out["FSC of the half maps"] = plot_fsc(curves, box, pixel_size, values.get("resolution"))
    if (rows := structure.last("model_fsc")) is not None:
        curves, box, pixel_size = curves_of(rows, MODEL_LABELS)
        mark = values.get("model_resolution")
        out["Map against model"] = plot_fsc(curves, box, pixel_size, mark if mark and mark < 900 else None)
    if (path := structure.last("map")) is not None:
        volume = read_map(path)
        if len(set(volume.data.shape)) == 1 and volume.pixel_size > 0:
            out["Map"] = plot_map(volume.data.numpy(), volume.pixel_size)
    if (local := structure.last("local_resolution")) is not None:
        out["Local resolution"] = plot_local_resolution(local)
    if (angles := structure.last("angles")) is not None:
        group = str(values.get("symmetry", "C1"))
        out["Viewing directions"] = plot_directions(angles[:, 0], angles[:, 1], operators(group).numpy(), group)
    if (residues := structure.last("residues")) is not None:
        out["Q-scores"] = plot_q_scores(residues)
    return out


def grouped_table(columns: Sequence[Structure], params: Params) -> tuple[str, list[list[str]]]:
    """(HTML of Table 1, its rows for a spreadsheet)."""
    cells = [table_one(column.values, params) for column in columns]
    rows: list[list[str]] = []
    section = ""
    for line in zip(*cells, strict=True):
        if line[0][0] != section:
            section = line[0][0]
            rows.append([section, *("" for _ in columns)])
        rows.append([line[0][1], *(cell for _, _, cell in line)])
    return table(rows, ["", *(column.name for column in columns)]), rows


def provenance(runs: Sequence[Facts]) -> str:
    """A table of the runs: what made them, when, how long it took."""
    rows = []
    for facts in runs:
        made = f"frazil {facts.job['version']} {str(facts.job.get('commit') or '')[:10]}" if facts.job.get("version") else "RELION"
        took = spoken_time(facts.seconds) if facts.seconds else UNKNOWN
        rows.append((str(facts.path), facts.kind or UNKNOWN, made, facts.job.get("created", UNKNOWN), took))
    return table(rows, ("run", "job", "made by", "started", "time"))


def run(params: Params, run: Run | None) -> None:
    """Write the page and the table."""
    if params.output.suffix not in (".html", ".htm"):
        raise BadInput(f"--output: {params.output} should end in .html")
    runs = [read_run(path) for path in dict.fromkeys(params.runs)]
    columns = structures(runs)
    page_table, rows = grouped_table(columns, params)
    title = params.title or "Validation of " + ", ".join(column.name for column in columns)
    parts = [f"<h1>{escape(title)}</h1><span>{now()}</span>"]
    for column in columns:
        v = column.values
        shown = [(number(v.get(key), style, unit), f"{what}, {column.name}" if len(columns) > 1 else what) for key, style, unit, what in (
            ("resolution", ".2f", " Å", "resolution, FSC 0.143"), ("model_resolution", ".2f", " Å", "map-model FSC 0.5"),
            ("q_score", ".2f", "", "mean Q-score"), ("particles", ",d", "", "particles")) if v.get(key) is not None]  # fmt: skip
        parts.append(key_figures(shown))
    parts += warnings(f"{facts.path.name}: {line}" for facts in runs for line in facts.warnings)
    parts.append(f"<h2>Table 1</h2>{page_table}<p><small>{UNKNOWN}: no file of these runs tells it. Geometry of the model "
                 "(bonds, clashes, rotamers, Ramachandran) comes from MolProbity or the PDB's validation report.</small></p>")  # fmt: skip
    for column in columns:
        for name, figure in figures_of(column).items():
            parts.append(picture(f"{name}: {column.name}" if len(columns) > 1 else name, png(figure), CAPTIONS[name]))
    parts += [f"<h2>Runs</h2>{provenance(runs)}", f"<footer>frazil {frazil.__version__}</footer>"]
    write_text(params.output, document(title, parts))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["", *(column.name for column in columns)], *rows])
    write_text(params.output.with_suffix(".csv"), text.getvalue())
    names = ", ".join(column.name for column in columns)
    print(f"{params.output}: {len(runs)} runs, columns {names}; table in {params.output.with_suffix('.csv')}")
