"""From a movie to its CTF through both commands: the power spectrum that motion correction saves and its sum tell the same defocus."""
from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from frazil.cli import main
from frazil.data import Optics
from frazil.io.micrographs import read_micrographs
from frazil.io.movies import write_tiff
from frazil.io.star import write_star
from frazil.simulate.ctf import CtfMicrographSettings, simulate_ctf_micrograph


@pytest.mark.slow
def test_a_movie_keeps_its_defocus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight frames share a specimen that drifts by two pixels a frame; the angle stays too: TIFF is mirrored on writing and reading."""
    monkeypatch.chdir(tmp_path)
    optics = Optics(1.1)
    whole = simulate_ctf_micrograph(optics, CtfMicrographSettings((1640, 1580), dose=200.0, particles=30),
                                    torch.tensor([13400.0, 12600.0, 35.0], dtype=torch.float64))  # fmt: skip
    rng = torch.Generator().manual_seed(2)
    frames = [torch.poisson(whole[:, 2 * f : 2 * f + 1560] * (5 / 200.0), generator=rng).to(torch.uint8).numpy() for f in range(8)]
    write_tiff("movie.tif", frames)
    table = pd.DataFrame({"rlnOpticsGroupName": ["a"], "rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [1.1],
                          "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1]})  # fmt: skip
    write_star("movies.star", {"optics": table, "movies": pd.DataFrame({"rlnMicrographMovieName": ["movie.tif"], "rlnOpticsGroup": 1})})
    common = ["--quiet", "--device", "cpu", "--threads", "1"]
    motion = ["--dose", "5", "--patches", "1", "1", "--no-dose-weighting-too"]
    assert main(["motion", "movies.star", "--output", "Motion", *motion, *common]) == 0
    # Spectra of single frames of 5 e/Å² have rings an eighth as high as those of the sum.
    for name, option, loose in (("sums", [], 1), ("spectra", ["--use-power-spectra"], 2)):
        assert main(["ctf", "Motion/corrected_micrographs.star", "--output", name, *option, *common]) == 0
        u, v, angle = read_micrographs(f"{name}/micrographs_ctf.star").defocus[0].tolist()
        assert (u + v) / 2 == pytest.approx(13000, abs=50 * loose), name
        assert u - v == pytest.approx(800, abs=100 * loose), name
        assert angle == pytest.approx(35, abs=5 * loose), name
