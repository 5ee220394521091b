"""RELION 3.1 goes on from the files of `frazil class2d`: its next iteration agrees with ours."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.jobs.test_class2d import LAST, command, data, finished, one_numba_thread

from frazil.cli import main
from frazil.io.mrc import read_stack
from frazil.io.star import read_star

__all__ = ["data", "finished", "one_numba_thread"]
pytestmark = pytest.mark.agree


def test_relion_continues_a_classification(data: Path, finished: Path, tmp_path: Path) -> None:
    relion = shutil.which("relion_refine")
    if relion is None:
        pytest.skip("no relion_refine on the PATH")
    words = [relion, "--continue", finished / f"run_it{LAST:03d}_optimiser.star", "--iter", LAST + 1, "--o", tmp_path / "theirs", "--j", 1]
    done = subprocess.run([str(w) for w in words], cwd=data, capture_output=True, text=True, timeout=120, check=False)
    stack = tmp_path / f"theirs_it{LAST + 1:03d}_classes.mrcs"
    assert stack.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    assert main(command(data, tmp_path / "ours", "--iterations", LAST + 1)) == 0
    ours = read_stack(tmp_path / "ours" / f"run_it{LAST + 1:03d}_classes.mrcs")
    theirs = read_stack(stack)
    assert theirs.shape == ours.shape
    a, b = (read_star(path)["particles"] for path in (tmp_path / "ours" / "run_data.star", tmp_path / f"theirs_it{LAST + 1:03d}_data.star"))
    known = dict(zip(b["rlnImageName"], b["rlnClassNumber"].astype(int), strict=True))
    same = torch.tensor([known[name] == int(k) for name, k in zip(a["rlnImageName"], a["rlnClassNumber"], strict=True)])
    assert same.double().mean() > 0.85  # perturbed grids differ, and the units of the shift prior
    large = int(torch.bincount(torch.tensor(a["rlnClassNumber"].to_numpy(dtype=int)) - 1, minlength=3).argmax())
    pair = torch.stack([ours[large].flatten(), theirs[large].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95
