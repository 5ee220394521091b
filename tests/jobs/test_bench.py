"""`frazil bench class3d`: a line with what was measured; classes are compared under the best naming."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from frazil.jobs.bench import PHASES, Class3dBench, agreement, run


def test_a_tiny_benchmark_measures_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.jsonl"
    run(Class3dBench(particles=24, box=32, classes=2, iterations=3, healpix_order=0, device="cpu", output=out))
    line = json.loads(out.read_text())
    assert line["bench"] == "class3d" and line["shape"]["classes"] == 2 and line["processes"] == 1
    assert set(line["phases"]) == set(PHASES) and all(line["phases"][name] > 0 for name in ("windows", "coarse", "fine", "sums", "M-step"))
    assert len(line["each"]) == 3 and line["seconds"] == line["each"][2]  # those after the second
    assert set(line["files"]) == {"read", "write"} and min(line["files"].values()) > 0
    assert line["busy"] is None and line["peak_gb"] is None  # there is no GPU; NaN would be no JSON
    assert 0.5 <= line["correct"] <= 1 and line["coarse_ceiling"] > 0
    assert "class3d, 24 particles of 32 px, K = 2" in capsys.readouterr().out


def test_classes_agree_under_the_best_one_to_one_naming() -> None:
    true = torch.tensor([0, 0, 0, 1, 1, 2])
    found = torch.tensor([2, 2, 1, 1, 1, 0])  # 0 is called 2, 1 is 1, 2 is 0; one of six is wrong
    correct, off = agreement(true, found, torch.tensor([1 / 6, 3 / 6, 2 / 6]))
    assert correct == pytest.approx(5 / 6) and off == pytest.approx(1 / 6)
