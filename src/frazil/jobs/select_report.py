"""report.html of `frazil select`: what each filter left; classes with scores and reasons."""
from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import torch

from frazil.io.files import write_text
from frazil.jobs import html
from frazil.jobs.plots import Array
from frazil.jobs.record import plain
from frazil.jobs.run import Run
from frazil.jobs.select_classes import Ranked, plot_ranked
from frazil.steps.rank import reasons

CAPTION = ("Best score first; framed ones stay. Score: chance that the average is one of a good class, from the features listed below; "
           "look at those around the limit yourself.")  # fmt: skip


def write_report(run: Run, start: int, left: int, kind: str, steps: Sequence[str], ranked: Ranked | None, kept: Array | None) -> None:
    """Write report.html, and plots/classes.png where classes were scored."""
    name = run.path.resolve().name
    parts = [f"<h1>{escape(name)}</h1><span>select</span>", html.key_figures([(f"{left:,}", f"{kind} stay"), (f"{start:,}", "were there")])]
    if steps:
        parts.append("<h2>Filters</h2>" + html.table([(line,) for line in steps], ("what stayed",)))
    if ranked is not None and kept is not None:
        score = ranked.score.numpy()
        order = [k for k in np.argsort(-score, kind="stable").tolist() if bool(torch.isfinite(ranked.features[k, 0]))]
        titles = [f"{k + 1}: {score[k]:.2f}" for k in range(len(score))]
        figure = plot_ranked(ranked.averages.numpy(), titles, np.asarray(kept), order)
        parts.append(html.picture("Classes by score", html.write_plots(run.path / "plots", {"classes": figure})["classes"], CAPTION))
        rows = [(k + 1, f"{score[k]:.3f}", "stays" if kept[k] else "", reasons(ranked.terms[k]) or "nothing stands out") for k in order]
        parts.append("<h2>Reasons</h2>" + html.table(rows, ("class", "score", "", "why")))
    rows = [(key, "–" if value is None else value) for key, value in plain(run.params.model_dump()).items()]
    parts.append("<h2>Parameters</h2>" + html.table(rows, ("parameter", "value")))
    write_text(run.path / "report.html", html.document(f"{name}: select", parts))
