"""frazil doctor prints what there is and names what is missing."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import frazil
from frazil.cli import main
from frazil.jobs.doctor import devices, problems


def test_it_names_versions_devices_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in (frazil.__version__, torch.__version__, "GB memory free", "disk", "threads"):
        assert word in shown
    assert devices()[0][0] == "cpu"


def test_what_is_missing_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gemmi" else find(name, *rest))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("frazil.jobs.doctor.LITTLE_DISK", 1e9)
    found = "\n".join(problems(Path()))
    assert "pip install 'frazil[models]'" in found and "relion_refine" in found and "disk free" in found
