"""frazil ctf: files, labels, resume, micrographs that cannot be used, options that cannot work."""
from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from frazil.cli import main
from frazil.data import Optics
from frazil.io.micrographs import read_micrographs
from frazil.io.mrc import read_header, read_mrc, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.ctf_report import outliers
from frazil.simulate.ctf import CtfMicrographSettings, noise_micrograph, simulate_ctf_micrograph
from frazil.steps.ctf import CtfSettings, micrograph_spectrum

OPTICS = Optics(1.5, voltage=200.0, cs=1.4)
SETTINGS = CtfMicrographSettings((768, 704), dose=60.0, particles=10)
TRUTH = {"a": 11000.0, "b": 16000.0}
COMMAND = ["ctf", "mics.star", "--output", "out", "--quiet", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def images() -> dict[str, torch.Tensor]:
    defocus = {name: torch.tensor([d + 200, d - 200, 30.0], dtype=torch.float64) for name, d in TRUTH.items()}
    made = {name: simulate_ctf_micrograph(OPTICS, SETTINGS, d) for name, d in defocus.items()}
    return {**made, "noise": noise_micrograph(OPTICS, SETTINGS)}


def listed(names: list[str], **columns: list[str]) -> None:
    optics = pd.DataFrame({"rlnOpticsGroupName": ["first"], "rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [1.5],
                           "rlnMicrographPixelSize": [1.5], "rlnVoltage": [200.0], "rlnSphericalAberration": [1.4],
                           "rlnAmplitudeContrast": [0.1]})  # fmt: skip
    rows = pd.DataFrame({"rlnMicrographName": names, "rlnOpticsGroup": 1, "rlnAccumMotionTotal": 3.5, **columns})
    write_star("mics.star", {"optics": optics, "micrographs": rows})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: dict[str, torch.Tensor]) -> Path:
    """mics/a.mrc, b.mrc, noise.mrc and mics.star (a, b) in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mics").mkdir()
    for name, image in images.items():
        write_mrc(f"mics/{name}.mrc", image, 1.5, "int16")
    listed(["mics/a.mrc", "mics/b.mrc"])
    return tmp_path


def test_files_and_labels(project: Path) -> None:
    assert main(COMMAND) == 0
    table = read_micrographs("out/micrographs_ctf.star")
    assert table.names == ("mics/a.mrc", "mics/b.mrc") and bool(table.has_ctf.all())
    for i, truth in enumerate(TRUTH.values()):
        assert float(table.defocus[i, :2].mean()) == pytest.approx(truth, abs=80)
    row = table.table.iloc[0]
    assert float(row["rlnAccumMotionTotal"]) == 3.5 and "rlnPhaseShift" not in row  # other columns stay
    assert float(row["rlnCtfAstigmatism"]) == pytest.approx(float(row["rlnDefocusU"]) - float(row["rlnDefocusV"]), abs=2e-3)
    assert float(row["rlnCtfMaxResolution"]) < 8 and float(row["rlnCtfFigureOfMerit"]) > 0.05 and "rlnCtfIceRingDensity" in row
    image, suffix = row["rlnCtfImage"].split(":")
    assert suffix == "mrc" and read_header(image).shape[1:] == (512, 512) and image == "out/mics/a.ctf"
    assert read_header(image).pixel_size[0] == pytest.approx(1.5, rel=0.1)
    with Image.open("out/mics/a_ctf.png") as picture:
        assert picture.size == (1260, 560)
    star = read_star("out/mics/a_ctf.star")
    assert star["ctf"]["rlnDefocusU"] == pytest.approx(float(row["rlnDefocusU"])) and star["ctf"]["frazilDefocusError"] < 80
    assert {"rlnResolution", "frazilEquiphaseAverage", "frazilModel"} <= set(star["equiphase_average"].columns)
    page = Path("out/report.html").read_text()
    assert "Astigmatism" in page and "median defocus" in page and Path("out/plots/defocus.png").exists()
    assert not Path("out/left_out.star").exists()


def test_saved_spectra_have_their_own_pixel_size(project: Path, images: dict[str, torch.Tensor]) -> None:
    """The pixel size of the spectrum counts, not that of the micrograph beside it."""
    spectrum = micrograph_spectrum(images["a"], 1.5, CtfSettings(box=384))
    write_mrc("mics/a_PS.mrc", spectrum.picture, spectrum.picture_pixel)
    listed(["mics/gone.mrc"], rlnCtfPowerSpectrum=["mics/a_PS.mrc"])
    star = Path("mics.star").read_text()
    Path("mics.star").write_text(star.replace("1.5 ", "0.9 "))  # binned since: the micrograph's own is no matter
    assert main([*COMMAND, "--use-power-spectra"]) == 0
    assert float(read_micrographs("out/micrographs_ctf.star").defocus[0, :2].mean()) == pytest.approx(11000, abs=100)


def test_unweighted_sums_are_used(project: Path) -> None:
    listed(["mics/b.mrc"], rlnMicrographNameNoDW=["mics/a.mrc"])
    assert main(COMMAND) == 0
    table = read_micrographs("out/micrographs_ctf.star")
    assert table.names == ("mics/b.mrc",) and float(table.defocus[0, :2].mean()) == pytest.approx(11000, abs=80)
    assert main([*COMMAND[:3], "weighted", *COMMAND[4:], "--dose-weighted"]) == 0
    assert float(read_micrographs("weighted/micrographs_ctf.star").defocus[0, :2].mean()) == pytest.approx(16000, abs=80)


def test_resume_redoes_what_is_missing_or_half_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frazil.jobs import ctf

    assert main(COMMAND) == 0
    table = Path("out/micrographs_ctf.star").read_text()
    files = [Path(f"out/mics/a{ending}") for ending in (".ctf", "_ctf.png", "_ctf.star")]
    assert ctf.is_done(files, "mics/a.mrc") and not ctf.is_done(files, "elsewhere/a.mrc")
    for path in files:  # each must be whole
        whole = path.read_bytes()
        path.write_bytes(whole[: int(0.7 * len(whole))])
        assert not ctf.is_done(files, "mics/a.mrc"), path
        if path != files[-1]:
            path.write_bytes(whole)
    done: list[str] = []
    work = ctf.finish
    monkeypatch.setattr(ctf, "finish", lambda task: done.append(task.name) or work(task))
    assert main([*COMMAND, "--resume"]) == 0
    assert done == ["mics/a.mrc"] and Path("out/micrographs_ctf.star").read_text() == table
    Path("out/micrographs_ctf.star").unlink()
    listed(["mics/noise.mrc", "mics/a.mrc", "mics/b.mrc"])  # grown, not even at its end
    assert main([*COMMAND, "--resume"]) == 0
    assert done == ["mics/a.mrc", "mics/noise.mrc"] and Path("out/micrographs_ctf.star").read_text() == table  # noise shows no rings
    assert read_star("out/left_out.star")["micrographs"]["rlnMicrographName"].tolist() == ["mics/noise.mrc"]


def test_processes_find_what_threads_do(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listed(["mics/a.mrc", "mics/gone.mrc", "mics/noise.mrc", "mics/b.mrc"])
    assert main(COMMAND) == 0
    monkeypatch.setattr("frazil.jobs.ctf.MANY", 1)
    monkeypatch.setattr("frazil.jobs.ctf_work.estimate_ctf", None)  # of this process
    assert main([*COMMAND[:3], "other", *COMMAND[4:-1], "2"]) == 0
    for name in ("micrographs_ctf.star", "left_out.star", "mics/a_ctf.star", "mics/b_ctf.star", "mics/noise_ctf.star"):
        assert Path("other", name).read_text().replace("other/", "out/") == Path("out", name).read_text(), name
    assert Path("other/mics/a_ctf.png").read_bytes() == Path("out/mics/a_ctf.png").read_bytes()
    assert torch.equal(read_mrc("other/mics/b.ctf").data, read_mrc("out/mics/b.ctf").data)


def test_bad_micrographs_are_listed_and_the_job_succeeds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mrc("mics/flat.mrc", torch.full((300, 300), 7.0), 1.5)
    content = bytearray(Path("mics/flat.mrc").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    Path("mics/nan.mrc").write_bytes(content)
    write_mrc("mics/tiny.mrc", torch.randn(60, 60), 1.5)
    write_mrc("mics/movie.mrc", torch.randn(4, 64, 64), 1.5, stack=True)
    Path("mics/cut.mrc").write_bytes(Path("mics/a.mrc").read_bytes()[:40000])
    Path("mics/text.mrc").write_text("no image")
    bad = {"flat": "same value", "nan": "not finite", "tiny": "at least 128", "movie": "correct its motion", "cut": "truncated",
           "text": "shorter than an MRC header", "gone": "no such file", "noise": "no Thon rings"}  # fmt: skip
    listed(["mics/a.mrc", *(f"mics/{name}.mrc" for name in bad), "mics/b.mrc"])
    assert main([o for o in COMMAND if o != "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "CTF of 2 of 10 micrographs" in said and "7 unreadable" in said and "1 without rings" in said
    assert read_micrographs("out/micrographs_ctf.star").names == ("mics/a.mrc", "mics/b.mrc")
    left = read_star("out/left_out.star")["micrographs"]
    log, page = Path("out/log.txt").read_text(), Path("out/report.html").read_text()
    for name, reason in bad.items():
        row = left[left["rlnMicrographName"] == f"mics/{name}.mrc"]
        assert len(row) == 1 and reason in row["frazilReason"].iloc[0], name
        assert f"mics/{name}.mrc" in log and f"mics/{name}.mrc" in page
    listed(["mics/flat.mrc", "mics/noise.mrc"])
    assert main([*COMMAND[:3], "none", *COMMAND[4:]]) == 2
    error = capsys.readouterr().err
    assert "no CTF for any of its 2 micrographs" in error and "flat.mrc" in error and "Traceback" not in error


def test_what_is_refused(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: str, table: str = "mics.star") -> str:
        assert main(["ctf", table, *COMMAND[2:], *options]) == 2
        return capsys.readouterr().err

    assert "not below --max-defocus" in refused("--min-defocus", "20000", "--max-defocus", "10000")
    assert "not well below --coarsest" in refused("--finest", "25")
    assert "has no column _rlnCtfPowerSpectrum" in refused("--use-power-spectra")
    assert "not below --max-phase" in refused("--phase-plate", "--min-phase", "90", "--max-phase", "30")
    assert "pixels of 12 Å" in refused("--pixel-size", "12")
    assert "no such file" in refused(table="other.star")
    write_star("bare.star", {"micrographs": pd.DataFrame({"rlnMicrographName": ["mics/a.mrc"]})})
    assert "has no _rlnVoltage; give --voltage" in refused(table="bare.star")
    write_star("twice.star", {"micrographs": pd.DataFrame({"rlnMicrographName": ["mics/a.mrc"] * 2, "rlnVoltage": 300})})
    assert "listed twice" in refused(table="twice.star")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("frazil.io.mrc._new_file", full)
    assert "the disk is full" in refused()  # that ends the job, it is no fault of the micrograph


def test_one_image_and_constants_from_options(project: Path) -> None:
    constants = ["--voltage", "200", "--cs", "1.4", "--amplitude-contrast", "0.1"]
    assert main(["ctf", "mics/a.mrc", *COMMAND[2:], *constants]) == 0
    table = read_micrographs("out/micrographs_ctf.star")
    assert float(table.defocus[0, :2].mean()) == pytest.approx(11000, abs=80)
    assert (table.optics[0].voltage, table.optics[0].cs, table.optics[0].pixel_size) == (200.0, 1.4, 1.5)
    assert main(["ctf", "mics.star", "--output", "other", *COMMAND[4:], "--voltage", "300"]) == 0
    again = read_micrographs("other/micrographs_ctf.star")
    assert again.optics[0].voltage == 300 and again.optics[0].cs == 1.4
    assert float(again.defocus[0, :2].mean()) == pytest.approx(11000 * 0.0250795 / 0.0196876, rel=0.03)  # λΔf is what rings tell


def test_a_phase_plate_is_written(project: Path) -> None:
    made = simulate_ctf_micrograph(OPTICS, SETTINGS, torch.tensor([9000.0, 8900.0, 0.0], dtype=torch.float64), 70.0)
    write_mrc("mics/p.mrc", made, 1.5)
    listed(["mics/p.mrc"])
    assert main([*COMMAND, "--phase-plate", "--phase-step", "20", "--min-phase", "40", "--max-phase", "100"]) == 0
    assert float(read_micrographs("out/micrographs_ctf.star").phase_shift[0]) == pytest.approx(70, abs=12)


def test_an_earlier_estimate_is_replaced(project: Path) -> None:
    listed(["mics/a.mrc"], rlnDefocusU=["5"], rlnDefocusV=["5"], rlnDefocusAngle=["0"], rlnPhaseShift=["90"], rlnCtfImage=["x.ctf:mrc"])
    assert main(COMMAND) == 0
    table = read_micrographs("out/micrographs_ctf.star")
    assert list(table.table.columns).count("rlnDefocusU") == 1 and "rlnPhaseShift" not in table.table
    assert float(table.defocus[0, 0]) > 9000
    assert read_mrc("out/mics/a.ctf").data.shape == (1, 512, 512)


def test_constants_from_options_where_a_table_with_a_ctf_has_none(project: Path, capsys) -> None:
    columns = {"rlnMicrographName": ["mics/a.mrc"], "rlnMicrographPixelSize": [1.5], "rlnDefocusU": [5.0], "rlnDefocusV": [5.0]}
    write_star("mics.star", {"micrographs": pd.DataFrame(columns)})
    assert main(COMMAND) == 2
    assert "give --voltage" in capsys.readouterr().err
    assert main([*COMMAND, "--voltage", "200", "--cs", "1.4", "--amplitude-contrast", "0.1"]) == 0
    table = read_micrographs("out/micrographs_ctf.star")
    assert (table.optics[0].voltage, table.optics[0].cs) == (200.0, 1.4)
    assert float(table.defocus[0, :2].mean()) == pytest.approx(11000, abs=80)


def test_outliers() -> None:
    values = np.array([10.0, 11, 9, 10.5, 9.5, 80, np.nan])
    assert outliers(values, 0.1).tolist() == [False] * 5 + [True, False]
    assert outliers(-values, 0.1).tolist() == [False] * 7 and outliers(-values, 0.1, both=True)[5]
    assert not outliers(np.array([1.0, 100]), 0.1).any()
