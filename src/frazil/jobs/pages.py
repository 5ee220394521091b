"""report.html of a job on maps: key figures, warnings, plots, parameters; one file that needs no other."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from frazil.io.files import write_text
from frazil.jobs import html
from frazil.jobs.record import plain
from frazil.jobs.run import Run


@dataclass(frozen=True)
class Picture:
    """A figure of the page with its title and what it shows."""

    name: str  # plots/NAME.png
    title: str
    caption: str
    figure: Figure


def write_page(run: Run, numbers: Sequence[tuple[str, str]], warnings: Sequence[str], pictures: Sequence[Picture]) -> Path:
    """Write plots/*.png and report.html of a run; `numbers` are (value, what it is). Returns the path of the page."""
    name = run.path.resolve().name
    content = html.write_plots(run.path / "plots", {p.name: p.figure for p in pictures})
    parts = [f"<h1>{escape(name)}</h1><span>{escape(run.job)}</span>", html.key_figures(numbers), *html.warnings(warnings)]
    parts += [html.picture(p.title, content[p.name], escape(p.caption)) for p in pictures]
    rows = [(key, "–" if value is None else value) for key, value in plain(run.params.model_dump()).items()]
    parts.append("<h2>Parameters</h2>" + html.table(rows, ("parameter", "value")))
    write_text(run.path / "report.html", html.document(f"{name}: {run.job}", parts))
    return run.path / "report.html"
