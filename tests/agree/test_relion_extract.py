"""RELION's own programs and our extraction: the same boxes from the same micrograph, and our stacks read by relion_refine and others."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.agree.test_relion_programs import relion

from frazil.io.mrc import read_map, read_stack, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs import extract
from frazil.jobs.run import Options, execute
from frazil.ops.boxes import level_

pytestmark = pytest.mark.agree
PIXEL, BOX = 3.0, 48
PLACES = [(60, 50), (120, 80), (170, 110), (15, 130), (90, 12)]  # whole pixels: RELION cuts fractions off; two reach over an edge


@pytest.fixture
def project(tmp_path, monkeypatch, rng) -> Path:
    """A micrograph with a slope, its CTF and picks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    line = torch.arange(200, dtype=torch.float32)
    image = 300 + 0.1 * line - 0.2 * line[:150, None] + 10 * torch.randn(150, 200, generator=rng)
    for x, y in PLACES:
        image[max(0, y - 5) : y + 5, max(0, x - 5) : x + 5] -= 30
    Path("mics").mkdir()
    write_mrc("mics/one.mrc", image, PIXEL)
    optics = pd.DataFrame({"rlnOpticsGroupName": ["opticsGroup1"], "rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [PIXEL],
                           "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1],
                           "rlnMicrographPixelSize": [PIXEL]})  # fmt: skip
    table = pd.DataFrame({"rlnMicrographName": ["mics/one.mrc"], "rlnOpticsGroup": [1], "rlnCtfImage": ["None"], "rlnDefocusU": [12000.0],
                          "rlnDefocusV": [11800.0], "rlnCtfAstigmatism": [200.0], "rlnDefocusAngle": [25.0], "rlnCtfFigureOfMerit": [0.2],
                          "rlnCtfMaxResolution": [6.0]})  # fmt: skip
    write_star("micrographs.star", {"optics": optics, "micrographs": table})
    write_star("mics/one_autopick.star", {"": pd.DataFrame({"rlnCoordinateX": [float(x) for x, _ in PLACES],
                                                            "rlnCoordinateY": [float(y) for _, y in PLACES]})})  # fmt: skip
    return tmp_path


def ours(out: str, **changes) -> Path:
    params = extract.Params(micrographs=Path("micrographs.star"), coordinates="mics", box=BOX, precision="float32", **changes)
    execute("extract", extract.run, params, Options(output=Path(out), device="cpu", threads=1, quiet=True))
    return Path(out)


@pytest.mark.parametrize("size", [BOX, 24])
def test_relion_preprocess_cuts_the_same_boxes(project, size):
    out = ours("ours", rescale=size, ramp=size == BOX)
    arguments = ["--i", "micrographs.star", "--coord_dir", "./", "--coord_suffix", "_autopick.star", "--part_star", "theirs/particles.star",
                 "--part_dir", "theirs/", "--extract", "--extract_size", BOX, "--norm", "--bg_radius", round(0.375 * size),
                 "--white_dust", -1, "--black_dust", -1, "--invert_contrast"]  # fmt: skip
    if size < BOX:
        arguments += ["--scale", size, "--no_ramp"]  # a plane has power at the Nyquist frequency, which is compared apart
    relion("relion_preprocess", project, *arguments)
    theirs = read_stack(project / "theirs" / "mics" / "one.mrcs")
    mine = read_stack(out / "mics" / "one.mrcs")
    assert mine.shape == theirs.shape == (len(PLACES), size, size)
    if size < BOX:  # RELION keeps the Nyquist frequency of the smaller box, of which half the information is cut away
        ft = torch.fft.rfft2(theirs)
        ft[:, size // 2], ft[:, :, size // 2] = 0, 0
        theirs = torch.fft.irfft2(ft, s=(size, size))
        level_(theirs, round(0.375 * size), 1.0, ramp=False)
    assert (mine[:3] - theirs[:3]).abs().max() < 2e-3
    assert np.corrcoef(mine[3:].flatten(), theirs[3:].flatten())[0, 1] > 0.98  # boxes over an edge: the same edge pixels repeated
    table = read_star(project / "theirs" / "particles.star")
    rows = read_star(out / "particles.star")
    for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnCoordinateX", "rlnCoordinateY"):
        assert np.allclose(table["particles"][label], rows["particles"][label])
    for label in ("rlnImagePixelSize", "rlnImageSize", "rlnVoltage", "rlnImageDimensionality"):
        assert np.allclose(table["optics"][label], rows["optics"][label])


def test_relion_reads_our_particles_and_reconstructs_and_classifies_them(project):
    ours("ours")
    relion("relion_image_handler", project, "--i", "ours/particles.star", "--o", "scaled", "--multiply_constant", 2)
    doubled = read_stack(project / "ours" / "mics" / "one_scaled.mrcs")
    assert torch.allclose(doubled, 2 * read_stack(project / "ours" / "mics" / "one.mrcs"), rtol=1e-5, atol=1e-5)
    relion("relion_reconstruct", project, "--i", "ours/particles.star", "--o", "back.mrc", "--ctf")
    assert read_map(project / "back.mrc").data.shape == (BOX, BOX, BOX)
    relion("relion_refine", project, "--i", "ours/particles.star", "--o", "./c2d", "--K", 1, "--iter", 1, "--ctf", "--norm", "--scale",
           "--particle_diameter", 100, "--psi_step", 30, "--offset_range", 2, "--offset_step", 2, "--oversampling", 0)  # fmt: skip
    assert (project / "c2d_it001_classes.mrcs").exists()
