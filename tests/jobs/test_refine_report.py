"""report.html from plain files: what it shows, and that it never fails for want of a file."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.io.mrc import write_mrc
from frazil.io.star import read_star
from frazil.jobs.plots import column, plot_directions, plot_fsc, resolution_axis
from frazil.jobs.refine_report import gather, key_figures, refine3d_report

ROWS = [
    {"event": "iteration", "iteration": i, "resolution": 40 / i, "current_size": 16 + 4 * i, "healpix_order": 2, "accuracy_rotation": 999.0,
     "accuracy_shift": None, "pmax": 0.1 * i, "seconds": 2.0, "changes_rotation": 9 / i, "changes_shift": 3 / i, "fsc": [1, 0.9, 0.5, 0.1]}
    for i in (1, 2, 3)
]  # fmt: skip


def write_events(folder: Path, rows: list[dict]) -> None:
    (folder / "events.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def pictures(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}">', page)


def test_a_run_without_files_still_has_a_report(tmp_path: Path) -> None:
    write_events(tmp_path, [])
    assert refine3d_report(tmp_path).read_text().startswith("<!doctype html>")


def test_an_unfinished_run_shows_its_course_and_warnings(tmp_path: Path) -> None:
    again = {**ROWS[1], "resolution": 21.5}  # iteration 2 repeated after --resume
    write_events(tmp_path, [*ROWS[:2], {"event": "warning", "message": "12 images <constant>"}, again, ROWS[2]])
    write_mrc(tmp_path / "run_class001.mrc", torch.rand(16, 16, 16), 4.0)
    (tmp_path / "job.json").write_text(json.dumps({"parameters": {"symmetry": "D2", "diameter": 50.0}, "seed": 7, "version": "0.1.0"}))
    page = refine3d_report(tmp_path).read_text()
    assert "12 images &lt;constant&gt;" in page and "<td>D2</td>" in page
    assert page.count("<td>21.50</td>") == 1 and "<td>20.00</td>" not in page
    assert {"Map", "Course of the refinement", "Resolution"} == set(pictures(page))
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # nothing is loaded from elsewhere (pictures may spell anything)
    assert all((tmp_path / "plots" / f"{name}.png").exists() for name in ("map", "progress", "fsc"))
    assert dict((what, value) for value, what in key_figures(gather(tmp_path)))["in iterations"] == "6.0 s"


@pytest.mark.real
def test_relions_own_final_files_make_a_whole_report(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "parity_relion5" / "refine3d"
    for name in ("run_model.star", "run_class001.mrc", "run_data.star", "run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc"):
        shutil.copyfile(source / name, tmp_path / name)
    write_events(tmp_path, ROWS)
    (tmp_path / "job.json").write_text(json.dumps({"parameters": {"symmetry": "D2", "diameter": 200.0, "mask": None}}))
    page = refine3d_report(tmp_path).read_text()
    assert len(pictures(page)) == 5
    found = gather(tmp_path)
    gold = read_star(source / "run_model.star")["model_class_1"]["rlnGoldStandardFsc"].to_numpy(float)
    assert np.corrcoef(found.curves["unmasked"][1:], gold[1:])[0, 1] > 0.95  # RELION's is of the unfiltered sums, ours of the maps
    assert found.angles is not None and len(found.angles) == 755


def test_unknown_values_are_left_out() -> None:
    assert np.isnan(column(ROWS, "accuracy_rotation")).all() and np.isnan(column(ROWS, "accuracy_shift")).all()
    assert column(ROWS, "resolution").tolist() == [40.0, 20.0, 40 / 3]


def test_directions_count_every_view_and_its_mates() -> None:
    rng = np.random.default_rng(1)
    rot, tilt = rng.uniform(-180, 180, 5000), np.degrees(np.arccos(rng.uniform(-1, 1, 5000)))
    figure = plot_directions(rot, tilt, np.stack([np.eye(3), np.diag([-1.0, -1.0, 1.0])]), "C2")
    counts = figure.axes[0].collections[0].get_array()
    latitude = np.linspace(-np.pi / 2, np.pi / 2, counts.shape[0] + 1)
    weight = np.diff(np.sin(latitude))[:, None]
    assert float((counts * weight).sum() / weight.sum() / counts.shape[1]) == pytest.approx(10000 / 768, rel=0.05)
    pole = plot_directions(np.array([0.0]), np.array([1.0]), np.eye(3)[None]).axes[0].collections[0].get_array()
    assert pole[-1].max() == 1 and pole[: counts.shape[0] // 2].max() == 0  # tilt 0 is at the top


def test_resolution_ticks_stay_apart_and_within_nyquist() -> None:
    for pixel in (0.5, 1.0, 3.54):
        axes = plot_fsc({"a": np.linspace(1, 0, 33)}, 64, pixel, 10.0).axes[0]
        ticks = np.asarray(axes.get_xticks())
        assert len(ticks) >= 3 and ticks.max() <= 0.5 / pixel and np.diff(ticks).min() > 0.5 / pixel / 13
    assert resolution_axis(axes, 0.1) is None
