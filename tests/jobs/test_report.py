"""frazil report: Table 1 and the page, from RELION's own project and from frazil's runs."""
from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import write_mrc
from frazil.io.star import write_star
from frazil.jobs.report import number, structures
from frazil.jobs.report_facts import FSC_LABELS, read_run


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def rows_of(path: Path) -> dict[str, list[str]]:
    return {line[0].strip(): line[1:] for line in csv.reader(path.read_text().splitlines())}


@pytest.mark.real
def test_relions_tutorial_project(tmp_path: Path, shared_data: Path) -> None:
    """Resolution, optics, symmetry and exposure of RELION's β-galactosidase tutorial (3.1)."""
    project = shared_data / "relion_stars" / "tutorial_3.1"
    folders = [project / name for name in ("PostProcess/job030", "Refine3D/job029", "MotionCorr/job002")]
    assert run("report", *folders, "--output", tmp_path / "r.html", "--emdb", "EMD-0000") == 0
    table = {name: cells[0] for name, cells in rows_of(tmp_path / "r.csv").items() if cells}
    assert table["Map resolution (Å), FSC 0.143"] == "2.82" and table["Symmetry imposed"] == "D2"
    assert table["Voltage (kV)"] == "200" and table["Spherical aberration (mm)"] == "1.4"
    assert table["Electron exposure (e⁻/Å²)"] == "30.6"  # 24 frames of 1.277
    assert table["Pixel size (Å)"] == "0.885" and table["Micrographs"] == "24" and table["EMDB code"] == "EMD-0000"
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img") == 2 and "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def made_run(folder: Path, job: str, inputs: dict[str, Path], **parameters: object) -> Path:
    """A directory with job.json and events.jsonl as a run leaves them."""
    folder.mkdir(parents=True)
    record = {"job": job, "parameters": parameters, "inputs": {k: {"path": str(p), "checksum": ""} for k, p in inputs.items()},
              "version": "0.1.0", "commit": "abc", "created": "2026-11-23T06:00:00+00:00", "directory": str(folder.parent)}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(record))
    events = [{"event": "warning", "message": f"careful with <{folder.name}>"}, {"event": "done", "seconds": 61.0}]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    return folder


def refinement(folder: Path, symmetry: str) -> Path:
    """A finished refinement of 40 particles."""
    made_run(folder, "refine3d", {}, symmetry=symmetry)
    rng = np.random.default_rng(0)
    optics = pd.DataFrame({"rlnOpticsGroupName": ["g"], "rlnOpticsGroup": [1], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
                           "rlnImagePixelSize": [2.0]})  # fmt: skip
    columns = {"rlnImageName": [f"{i + 1}@s.mrcs" for i in range(40)]}
    columns |= {label: rng.uniform(9e3, 2e4, 40) for label in ("rlnDefocusU", "rlnDefocusV")}
    columns |= {label: rng.uniform(0, 90, 40) for label in ("rlnAngleRot", "rlnAngleTilt")}
    write_star(folder / "run_data.star", {"optics": optics, "particles": pd.DataFrame(columns)})
    write_star(folder / "run_model.star", {"model_general": {"rlnOriginalImageSize": 16, "rlnPixelSize": 2.0, "rlnCurrentResolution": 5.5}})
    for name in ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc", "run_class001.mrc"):
        write_mrc(folder / name, torch.rand(16, 16, 16), 2.0)
    return folder


def postprocessed(folder: Path, source: Path, resolution: float) -> Path:
    """A post-processed map of that refinement."""
    made_run(folder, "postprocess", {"half1": source / "run_half1_class001_unfil.mrc"})
    shells = np.arange(9)
    curves = {"rlnSpectralIndex": shells, "rlnResolution": shells / 32.0, **{label: 1 - shells / 8 for label in FSC_LABELS.values()}}
    general = {"rlnFinalResolution": resolution, "rlnBfactorUsedForSharpening": -71.6}
    write_star(folder / "postprocess.star", {"general": general, "fsc": pd.DataFrame(curves)})
    write_mrc(folder / "postprocess.mrc", torch.rand(16, 16, 16), 2.0)
    return folder


def test_each_map_has_its_column(tmp_path: Path) -> None:
    one, two, three = (refinement(tmp_path / f"refine{i}", g) for i, g in ((1, "C1"), (2, "D2"), (3, "C3")))
    post1, post2 = (postprocessed(tmp_path / f"post{i}", s, d) for i, s, d in ((1, one, 4.25), (2, two, 6.5)))
    local = made_run(tmp_path / "local", "localres", {"half1": one / "run_half1_class001_unfil.mrc"})
    write_mrc(local / "relion_locres.mrc", torch.linspace(4, 8, 4096).reshape(16, 16, 16), 2.0)
    assert run("report", three, local, post2, one, two, post1, "--output", tmp_path / "r.html") == 0
    table = rows_of(tmp_path / "r.csv")
    columns = table[""]
    assert sorted(columns) == ["post1", "post2", "refine3"]
    row = dict(zip(columns, table["Map resolution (Å), FSC 0.143"], strict=True))
    assert row == {"post1": "4.25", "post2": "6.50", "refine3": "5.50"}
    assert dict(zip(columns, table["half maps compared"], strict=True))["refine3"] == "unmasked"
    assert dict(zip(columns, table["Symmetry imposed"], strict=True)) == {"post1": "C1", "post2": "D2", "refine3": "C3"}
    local_row = dict(zip(columns, table["Map resolution range (Å), 1st to 99th percentile"], strict=True))
    assert local_row == {"post1": "4.0 – 8.0", "post2": "–", "refine3": "–"}
    page = (tmp_path / "r.html").read_text()
    assert "careful with &lt;refine1&gt;" in page and "1 min 01 s" in page


def test_a_lone_refinement_and_what_no_file_tells(tmp_path: Path) -> None:
    folder = refinement(tmp_path / "refine", "C1")
    assert [s.name for s in structures([read_run(folder)])] == ["refine"]
    assert run("report", folder, "--output", tmp_path / "r.html", "--exposure", 40, "--initial-particles", 12345) == 0
    table = rows_of(tmp_path / "r.csv")
    assert table["Electron exposure (e⁻/Å²)"] == ["40.0"] and table["Initial particle images"] == ["12,345"]
    assert table["Final particle images"] == ["40"] and table["MolProbity score"] == ["–"]
    assert number((1.0, 2.5), ".1f") == "1.0 – 2.5" and number([300.0, 200.0]) == "300, 200" and number(None) == "–"


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    cases = (("none", "r.html", "no such folder"), ("empty", "r.html", "neither job.json"), ("empty", "r.pdf", "should end in .html"))
    for folder, page, told in cases:
        assert run("report", tmp_path / folder, "--output", page) == 2
        shown = capsys.readouterr().err
        assert told in shown and len(shown.strip().splitlines()) == 1
