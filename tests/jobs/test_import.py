"""frazil import: STAR files, headers checked all at once, optics groups, gains, later imports."""
from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.eer import events_of, write_eer
from frazil.io.gain import read_gain
from frazil.io.movie_table import read_movies
from frazil.io.movies import write_mrc_movie, write_tiff
from frazil.io.mrc import read_mrc, write_mrc
from frazil.io.star import read_star, write_star


def movie(path: str, rng: np.random.Generator, size: tuple[int, int] = (40, 48), gain: np.ndarray | None = None, mean: float = 3.0) -> None:
    rate = np.full(size, mean) if gain is None else mean / gain
    write_tiff(path, rng.poisson(rate, (4, *size)).astype(np.uint8))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, np_rng: np.random.Generator) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("Movies").mkdir()
    for number in (1, 2, 10):
        movie(f"Movies/m_{number}.tif", np_rng)
    return tmp_path


def imported(*options: str, output: str = "out") -> int:
    return main(["import", *options, "--output", output, "--quiet", "--settle", "0"])


def test_movies_in_natural_order(project: Path) -> None:
    options = ["Movies/*.tif", "--pixel-size", "0.885", "--voltage", "200", "--cs", "1.4", "--beam-tilt", "0.1", "-0.2"]
    assert imported(*options) == 0
    table = read_movies("out/movies.star")
    assert table.names == ("Movies/m_1.tif", "Movies/m_2.tif", "Movies/m_10.tif")
    assert (table.optics[0].pixel_size, table.optics[0].voltage, table.optics[0].cs) == (0.885, 200, 1.4)
    assert table.optics_table["rlnBeamTiltY"].tolist() == ["-0.2"]


def test_all_problems_at_once(project: Path, np_rng: np.random.Generator, capsys) -> None:
    Path("Movies/cut.tif").write_bytes(Path("Movies/m_1.tif").read_bytes()[:1500])
    movie("Movies/odd.tif", np_rng, (41, 48))
    Path("Movies/x.mdoc").write_bytes(b"\xff\xfe\x00")
    assert imported("Movies/*", "--pixel-size", "1.2") == 2
    said = capsys.readouterr().err
    for part in ("3 problems", "cut.tif: truncated", "odd.tif: 48 x 41 px, most are 48 x 40", "x.mdoc: is not a text file"):
        assert part in said
    assert imported("Movies/*", "--pixel-size", "1.2", "--skip-bad") == 0
    assert len(read_movies("out/movies.star").names) == 3


def test_later_imports_add_what_is_new(project: Path, np_rng: np.random.Generator, capsys) -> None:
    assert imported("Movies/*.tif", "--pixel-size", "1.2", "--optics-group", "first") == 0
    movie("Movies/m_3.tif", np_rng)
    options = ["Movies/*.tif", "--append", "out/movies.star"]
    assert imported(*options, "--pixel-size", "1.2", "--optics-group", "first", output="two") == 0
    table = read_movies("two/movies.star")
    assert table.names[3:] == ("Movies/m_3.tif",) and len(table.optics) == 1
    assert imported(*options, "--pixel-size", "1.2", "--optics-group", "second", output="three") == 2
    assert "is in out/movies.star already, as first" in capsys.readouterr().err
    assert imported("Movies/m_3.tif", *options[1:], "--pixel-size", "1.3", "--optics-group", "first", output="four") == 2
    assert "has _rlnMicrographOriginalPixelSize 1.2, not 1.3" in capsys.readouterr().err
    assert imported("Movies/m_3.tif", *options[1:], "--pixel-size", "1.3", "--optics-group", "second", output="five") == 0
    five = read_movies("five/movies.star")
    assert five.group.tolist() == [0, 0, 0, 1] and five.optics[1].pixel_size == 1.3


def test_growing_files_wait(project: Path, capsys) -> None:
    old = time.time() - 100
    os.utime("Movies/m_1.tif", (old, old))
    assert main(["import", "Movies/*.tif", "--pixel-size", "1", "--output", "out", "--quiet"]) == 0
    assert read_movies("out/movies.star").names == ("Movies/m_1.tif",)
    assert main(["import", "Movies/m_2.tif", "--pixel-size", "1", "--output", "new", "--quiet"]) == 2
    assert "too new" in capsys.readouterr().err


def test_mdoc_gives_optics_and_beam_shift_groups(project: Path, np_rng: np.random.Generator) -> None:
    for number in range(12):
        x, y = (number % 2) * 5.0, (number % 3) * 5.0
        movie(f"Movies/s_{number}.tif", np_rng)
        text = (f"Voltage = 200\n[FrameSet = 0]\nPixelSpacing = 0.83\nImageShift = {x + 0.01 * number} {y}\nSubFramePath = "
            f"X:\\data\\s_{number}.tif\n"
                "NumSubFrames = 4\nFrameDosesAndNumber = 1.5 4\n")  # fmt: skip
        Path(f"Movies/s_{number}.tif.mdoc").write_text(text)
    assert imported("Movies/*.mdoc", "--beam-shift-groups") == 0
    table = read_movies("out/movies.star")
    assert len(table.optics) == 6 and {o.pixel_size for o in table.optics} == {0.83} and table.optics[0].voltage == 200
    assert table.group[0] == table.group[6] and "recorded dose 6.0" in Path("out/log.txt").read_text()
    assert imported("Movies/m_1.tif", "--pixel-size", "1", "--beam-shift-groups", output="none") == 2
    movie("Movies/s_12.tif", np_rng)
    Path("Movies/s_12.tif.mdoc").write_text(Path("Movies/s_11.tif.mdoc").read_text().replace("s_11", "s_12"))
    again = ["Movies/*.mdoc", "--beam-shift-groups", "--append", "out/movies.star", "--clusters", "1"]
    assert imported(*again, "--optics-group", "opticsGroup1_1", output="same") == 2  # cluster 1 now need not be cluster 1 then
    assert imported(*again, "--optics-group", "later", output="later") == 0
    assert read_movies("later/movies.star").optics[6].name == "later"


def test_gain_is_turned_to_fit(project: Path, rng: torch.Generator, np_rng: np.random.Generator) -> None:
    gain = torch.exp(0.1 * torch.randn(128, 128, generator=rng))
    for number in (1, 2, 10):
        movie(f"Movies/m_{number}.tif", np_rng, (128, 128), gain.numpy(), 10.0)
    write_mrc("given.mrc", torch.rot90(gain, 1, (0, 1)), 1.0)
    assert imported("Movies/*.tif", "--pixel-size", "1", "--gain", "given.mrc") == 0
    assert torch.equal(read_mrc("out/gain.mrc").data[0], gain)
    assert "rotation 3, flip 0" in Path("out/log.txt").read_text()


def test_a_gain_that_fits_nowhere_is_not_said_to_fit(project: Path, rng: torch.Generator, np_rng: np.random.Generator) -> None:
    write_mrc("given.mrc", torch.exp(0.1 * torch.randn(40, 48, generator=rng)), 1.0)
    assert imported("Movies/*.tif", "--pixel-size", "1", "--gain", "given.mrc") == 0
    log = Path("out/log.txt").read_text()
    assert "gain fits in NO orientation and is not turned" in log and "gain fits with" not in log


@pytest.fixture(scope="module")
def eer_gain() -> torch.Tensor:
    """(64, 64) factors with one bad pixel."""
    gain = torch.exp(0.15 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))
    gain[5, 6] = 0
    return gain


@pytest.fixture
def eer(project: Path, np_rng: np.random.Generator, eer_gain: torch.Tensor) -> Path:
    """Movies/e.eer of a texture that moves, seen by a camera with that gain; 4 frames of 20 camera frames."""
    texture = 0.3 * np.sin(np.arange(64) / 3)[None] * np.cos(np.arange(64) / 4)[:, None]
    sensitivity = np.where(eer_gain > 0, 1 / eer_gain.clamp(min=0.1), 0)
    data = [b for f in range(4)
            for b in events_of(np.minimum(np_rng.poisson(8 * sensitivity * (1 + np.roll(texture, f, 1))), 20), 20, np_rng)]  # fmt: skip
    write_eer("Movies/e.eer", data, (64, 64))
    return project


@pytest.mark.parametrize("kind", ["counts.mrc", "factors.mrc", "vendor.gain", "turned.mrc"])
def test_gains_of_eer_movies_go_from_import_to_motion(eer: Path, eer_gain: torch.Tensor, kind: str) -> None:
    import tifffile

    write_mrc("counts.mrc", torch.where(eer_gain > 0, 50 / eer_gain.clamp(min=0.1), 0.0), 1.0)
    write_mrc("factors.mrc", eer_gain, 1.0)
    write_mrc("turned.mrc", torch.rot90(eer_gain, 1, (0, 1)), 1.0)
    tifffile.imwrite("vendor.gain", eer_gain.numpy())
    assert imported("Movies/e.eer", "--pixel-size", "1", "--gain", kind) == 0
    given = read_gain("out/gain.mrc", eer=True)
    ratio = (given / eer_gain)[eer_gain > 0]
    assert given[5, 6] == 0 and float(ratio.std() / ratio.mean()) < 1e-5  # factors again, in the right orientation
    reference = read_mrc("out/gain.mrc").data[0]
    assert torch.allclose(reference * given, (reference * given).max() * (given > 0), rtol=1e-4)  # counts, as RELION expects for EER
    log = Path("out/log.txt").read_text()
    assert "gain fits with rotation" in log and ("holds factors, which is not usual" in log) == (kind in ("factors.mrc", "turned.mrc"))
    options = ["--eer-grouping", "20", "--patches", "1", "1", "--spectrum-size", "0", "--quiet", "--device", "cpu", "--threads", "1"]
    assert main(["motion", "out/movies.star", "--gain", "out/gain.mrc", "--output", "m", *options]) == 0
    said = Path("m/log.txt").read_text()
    assert "mean counts" in said and "inverted" in said and "no orientation" not in said


def test_motion_refuses_factors_where_eer_has_counts_and_says_what_to_do(eer: Path, eer_gain: torch.Tensor, capsys) -> None:
    write_mrc("factors.mrc", eer_gain, 1.0)
    assert imported("Movies/e.eer", "--pixel-size", "1") == 0
    options = ["--eer-grouping", "20", "--patches", "1", "1", "--spectrum-size", "0", "--quiet", "--device", "cpu", "--threads", "1"]
    assert main(["motion", "out/movies.star", "--gain", "factors.mrc", "--output", "m", *options]) == 2
    assert "holds factors, not the counts" in capsys.readouterr().err


def test_a_movie_that_cannot_be_decoded_is_left_out_of_the_test_of_the_gain(project: Path, rng: torch.Generator, capsys) -> None:
    import tifffile

    write_mrc("given.mrc", torch.exp(0.1 * torch.randn(40, 48, generator=rng)), 1.0)
    whole = bytearray(Path("Movies/m_1.tif").read_bytes())
    with tifffile.TiffFile("Movies/m_1.tif") as file:
        start, length = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
    whole[start : start + length] = b"\xff" * length  # the header is good, frame 2 is not
    Path("Movies/m_1.tif").write_bytes(bytes(whole))
    assert imported("Movies/*.tif", "--pixel-size", "1", "--gain", "given.mrc") == 2
    assert "m_1.tif" in (said := capsys.readouterr().err) and "--skip-bad" in said
    assert imported("Movies/*.tif", "--pixel-size", "1", "--gain", "given.mrc", "--skip-bad") == 0
    assert read_movies("out/movies.star").names == ("Movies/m_2.tif", "Movies/m_10.tif")
    assert "left out: Movies/m_1.tif" in Path("out/log.txt").read_text()


def test_defects_are_checked_without_a_gain_too(project: Path, capsys) -> None:
    Path("good.txt").write_text("1 2 3 4\n")
    Path("bad.txt").write_text("1 2 3\n")
    Path("wide.txt").write_text("48 2 3 4\n")
    assert imported("Movies/*.tif", "--pixel-size", "1", "--defects", "good.txt", output="good") == 0
    for name, said in (("bad.txt", "line 1: expected four whole numbers"), ("wide.txt", "lies outside frames of 48 x 40 px")):
        assert imported("Movies/*.tif", "--pixel-size", "1", "--defects", name) == 2
        assert said in capsys.readouterr().err
    assert imported("given.mrc", "--kind", "map", "--defects", "good.txt") == 2


def mdoc(name: str, pixel: float, voltage: float | None = 300) -> None:
    head = "" if voltage is None else f"Voltage = {voltage}\n"
    Path(f"Movies/{name}.tif.mdoc").write_text(f"{head}[FrameSet = 0]\nPixelSpacing = {pixel}\nSubFramePath = X:\\{name}.tif\n")


def test_mixed_mdoc_files_make_optics_groups_of_their_own(project: Path, np_rng: np.random.Generator, capsys) -> None:
    movie("Movies/m_3.tif", np_rng)
    for name, pixel, voltage in (("m_1", 1.2, 300), ("m_2", 0.83, 300), ("m_3", 0.83, 200), ("m_10", 0.8302, 300)):
        mdoc(name, pixel, voltage)
    assert imported("Movies/*.mdoc") == 0
    table = read_movies("out/movies.star")
    found = {name: (o.pixel_size, o.voltage) for name, o in zip(table.names, (table.optics[g] for g in table.group), strict=True)}
    assert found == {"Movies/m_1.tif": (1.2, 300), "Movies/m_2.tif": (0.83, 300), "Movies/m_3.tif": (0.83, 200),
                     "Movies/m_10.tif": (0.83, 300)}  # fmt: skip
    assert len(table.optics) == 3 and "files of 3 kinds" in Path("out/log.txt").read_text()
    again = ["Movies/*.mdoc", "--append", "out/movies.star"]
    assert imported(*again, output="again") == 0 and len(read_movies("again/movies.star").names) == 4
    assert imported("Movies/*.mdoc", "--pixel-size", "0.83", "--voltage", "300", output="one") == 0
    log = Path("one/log.txt").read_text()
    assert "m_1.tif.mdoc: says pixels of 1.2 Å, not 0.83" in log and "m_3.tif.mdoc: says 200 kV, not 300" in log
    Path("Movies/m_10.tif.mdoc").unlink()
    assert imported("Movies/*.tif", output="lost") == 2
    said = capsys.readouterr().err
    assert "Movies/m_10.tif: nothing tells its pixel size, and others have 0.83, 1.2 Å" in said
    assert "Movies/m_10.tif: nothing tells its voltage" in said


def test_append_writes_no_number_that_was_not_there(project: Path, np_rng: np.random.Generator, capsys) -> None:
    Path("mtf.star").write_text("data_\n")
    assert imported("Movies/m_1.tif", "--pixel-size", "1", "--beam-tilt", "0.1", "0.2", output="tilt") == 0
    assert imported("Movies/m_1.tif", "--pixel-size", "1", "--mtf", "mtf.star", output="mtf") == 0
    new = ["Movies/m_2.tif", "--pixel-size", "1", "--optics-group", "new"]
    assert imported(*new, "--append", "tilt/movies.star") == 0  # no beam tilt is none: RELION takes 0 where the label is missing
    assert read_movies("out/movies.star").optics_table["rlnBeamTiltX"].tolist() == ["0.1", "0"]
    assert imported(*new, "--append", "mtf/movies.star", output="no") == 2
    assert "has _rlnMtfFileName, which the new rows do not have" in capsys.readouterr().err
    assert imported(*new, "--append", "mtf/movies.star", "--mtf", "mtf.star", output="both") == 0
    assert imported("Movies/m_2.tif", "--pixel-size", "1", "--append", "tilt/movies.star", "--mtf", "mtf.star", output="other") == 2
    assert "optics group opticsGroup1 has _rlnMtfFileName none, not mtf.star" in capsys.readouterr().err
    star = read_star("tilt/movies.star", text=True)
    star["movies"]["rlnDefocusU"] = "10000"
    write_star("more.star", star)
    assert imported(*new, "--append", "more.star", output="ctf") == 2
    assert "has _rlnDefocusU, which the new rows do not have" in capsys.readouterr().err


def test_micrographs_maps_and_coordinates(project: Path, rng: torch.Generator) -> None:
    write_mrc("mic_1.mrc", torch.randn(64, 80, generator=rng), 1.7)
    assert imported("mic_1.mrc") == 0
    star = read_star("out/micrographs.star")
    assert star["micrographs"]["rlnMicrographName"][0] == "mic_1.mrc" and star["optics"]["rlnMicrographPixelSize"][0] == pytest.approx(1.7)
    write_mrc("map.mrc", torch.randn(16, 16, 16, generator=rng), 2.0)
    assert imported("map.mrc", output="m") == 0 and Path("m/map.mrc").read_bytes() == Path("map.mrc").read_bytes()
    Path("mic_1.box").write_text("10 20 40 40\n0 4 20 20\n")
    assert imported("mic_1.box", "--micrographs", "out/micrographs.star", output="c") == 0
    row = read_star("c/coordinates.star")["coordinate_files"].iloc[0]
    found = read_star(row["rlnMicrographCoordinates"])
    table = next(iter(found.values()))
    assert row["rlnMicrographName"] == "mic_1.mrc"
    assert table["rlnCoordinateX"].tolist() == [30, 10] and table["rlnCoordinateY"].tolist() == [40, 14]


@pytest.mark.real
def test_real_particles(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(shared_data / "formats")
    assert imported("relion31.star", output=str(tmp_path / "out")) == 0
    assert len(read_star(tmp_path / "out" / "particles.star")["particles"]) == 5


def test_what_is_refused(project: Path, capsys, tmp_path_factory) -> None:
    outside = tmp_path_factory.mktemp("elsewhere")
    write_mrc_movie(outside / "a.mrcs", np.ones((3, 32, 36), np.int8), 1.3)
    for options, said in (
        (["none*.tif"], "no such file"),
        (["Movies/m_1.tif"], "--pixel-size: neither"),
        (["Movies/m_1.tif", "--pixel-size", "1", "--optics-group", "a b"], "other characters"),
        (["Movies/m_1.tif", "--pixel-size", "1", "--kind", "particles"], ""),
    ):
        assert imported(*options) == 2
        assert said in capsys.readouterr().err
    assert imported(str(outside / "a.mrcs"), output="whole") == 0
    assert "1 of 1 files lie outside this folder" in (project / "whole" / "log.txt").read_text()
    assert read_movies("whole/movies.star").names == (str(outside / "a.mrcs"),)
    assert imported(str(outside / "a.mrcs"), "--link") == 0
    assert read_movies("out/movies.star").file(0).resolve() == (outside / "a.mrcs").resolve()
