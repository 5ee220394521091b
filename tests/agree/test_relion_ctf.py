"""RELION's programs read what `frazil ctf` writes, and frazil what RELION's CtfFind wrote."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from frazil.cli import main
from frazil.data import Optics
from frazil.io.mrc import write_mrc
from frazil.io.particles import read_particles
from frazil.io.star import read_star, write_star
from frazil.simulate.ctf import CtfMicrographSettings, simulate_ctf_micrograph

pytestmark = pytest.mark.agree


def relion(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not on the PATH (Debian: apt install relion)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_relion_extracts_with_our_ctf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defocus, angle and phase shift of the particles RELION cuts out are those we wrote; its picture labels are read."""
    monkeypatch.chdir(tmp_path)
    optics = Optics(1.5)
    Path("mics").mkdir()
    made = simulate_ctf_micrograph(optics, CtfMicrographSettings((704, 704), dose=60.0, particles=5),
                                   torch.tensor([12300.0, 11700.0, 35.0], dtype=torch.float64), 60.0)  # fmt: skip
    write_mrc("mics/a.mrc", made, 1.5)
    table = pd.DataFrame({"rlnOpticsGroupName": ["first"], "rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [1.5],
                          "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1],
                          "rlnMicrographPixelSize": [1.5]})  # fmt: skip
    write_star("mics.star", {"optics": table, "micrographs": pd.DataFrame({"rlnMicrographName": ["mics/a.mrc"], "rlnOpticsGroup": 1})})
    assert main(["ctf", "mics.star", "--output", "CtfFind", "--quiet", "--threads", "1", "--phase-plate", "--phase-step", "30"]) == 0
    Path("picks/mics").mkdir(parents=True)
    write_star("picks/mics/a_pick.star", {"": pd.DataFrame({"rlnCoordinateX": [300.0, 400.0], "rlnCoordinateY": [350.0, 200.0]})})
    relion("relion_preprocess", "--i", "CtfFind/micrographs_ctf.star", "--coord_dir", "picks/", "--coord_suffix", "_pick.star",
           "--part_star", "Extract/particles.star", "--part_dir", "Extract/", "--extract", "--extract_size", "64", "--norm",
           "--bg_radius", "24", "--invert_contrast")  # fmt: skip
    ours = read_star("CtfFind/micrographs_ctf.star")["micrographs"].iloc[0]
    particles = read_particles("Extract/particles.star").particles
    assert len(particles) == 2
    for i, label in enumerate(("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")):
        assert particles.defocus[:, i].tolist() == pytest.approx([float(ours[label])] * 2, abs=1e-3)
    assert particles.phase_shift.tolist() == pytest.approx([float(ours["rlnPhaseShift"])] * 2, abs=1e-3)
    said = relion("relion_star_printtable", "CtfFind/micrographs_ctf.star", "data_micrographs", "rlnCtfImage", "rlnCtfMaxResolution",
                  "rlnCtfFigureOfMerit")  # fmt: skip
    assert "CtfFind/mics/a.ctf:mrc" in said
    relion("relion_image_handler", "--i", "CtfFind/mics/a.ctf:mrc", "--o", "copy.mrc", "--multiply_constant", "1")
