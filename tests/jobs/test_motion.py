"""frazil motion: files, labels, resume, bad movies, gains that do not fit."""
from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from frazil.cli import main
from frazil.io.eer import events_of, write_eer
from frazil.io.micrographs import read_micrographs
from frazil.io.movie_table import read_motion
from frazil.io.movies import write_mrc_movie, write_tiff
from frazil.io.mrc import read_header, read_mrc, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.motion_report import flags
from frazil.jobs.plots import new_figure

SIZE, FRAMES = (160, 192), 6


def frames(seed: int, gain: torch.Tensor | None = None) -> np.ndarray:
    """Counts of a texture that drifts by half a pixel a frame."""
    rng = torch.Generator().manual_seed(seed)
    ft = torch.fft.rfft2(torch.randn(SIZE, generator=rng))
    ky, kx = torch.fft.fftfreq(SIZE[0])[:, None], torch.fft.rfftfreq(SIZE[1])[None]
    ft = ft * torch.exp(-(ky.square() + kx.square()) * 100)
    scale = 0.3 / float(torch.fft.irfft2(ft, s=SIZE).std())
    out = []
    for f in range(FRAMES):
        image = 1 + scale * torch.fft.irfft2(ft * torch.exp(-2j * torch.pi * kx * 0.5 * f), s=SIZE)
        rate = 12 * image.clamp(min=0)
        out.append(torch.poisson(rate if gain is None else rate / gain, generator=rng))
    return torch.stack(out).to(torch.uint8).numpy()


def listed(names: list[str], group: int = 1) -> None:
    optics = pd.DataFrame({"rlnOpticsGroupName": ["a"], "rlnOpticsGroup": [1], "rlnMicrographOriginalPixelSize": [1.1],
                           "rlnVoltage": [200.0],
                           "rlnSphericalAberration": [1.4], "rlnAmplitudeContrast": [0.1]})  # fmt: skip
    write_star("movies.star", {"optics": optics, "movies": pd.DataFrame({"rlnMicrographMovieName": names, "rlnOpticsGroup": group})})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Movies/a.tif, b.mrcs, c.eer and movies.star in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Movies").mkdir()
    write_tiff("Movies/a.tif", frames(1))
    write_mrc_movie("Movies/b.mrcs", frames(2).astype(np.int16), 1.1)
    listed(["Movies/a.tif", "Movies/b.mrcs"])
    return tmp_path


COMMAND = ["motion", "movies.star", "--output", "out", "--dose", "2", "--patches", "1", "1", "--spectrum-size", "64", "--quiet"]


def test_files_and_labels(project: Path) -> None:
    assert main([*COMMAND, "--bin", "2", "--even-odd"]) == 0
    table = read_micrographs("out/corrected_micrographs.star")
    assert table.names == ("out/Movies/a.mrc", "out/Movies/b.mrc") and table.optics[0].pixel_size == pytest.approx(2.2)
    row = table.table.iloc[0]
    for label in ("rlnCtfPowerSpectrum", "rlnMicrographNameEven", "rlnMicrographNameOdd", "rlnMicrographMetadata"):
        assert Path(row[label]).exists()
    assert read_header("out/Movies/a.mrc").shape == (1, 80, 96)
    assert float(row["rlnAccumMotionTotal"]) == pytest.approx(5 * 0.5 * 1.1, abs=0.5)  # Å, not px
    assert float(row["rlnAccumMotionEarly"]) + float(row["rlnAccumMotionLate"]) == pytest.approx(float(row["rlnAccumMotionTotal"]))
    record = read_motion("out/Movies/a.star")
    assert record.general["rlnImageSizeX"] == 192 and record.general["rlnMicrographBinning"] == 2
    assert (record.track[:, 0] - -0.5 * torch.arange(6)).abs().max() < 0.3 and record.coefficients is None
    star = read_star("out/Movies/a.star")
    assert list(star["global_shift"]["rlnMicrographFrameNumber"]) == [1, 2, 3, 4, 5, 6] and star["general"]["rlnMotionModelVersion"] == 0
    assert "Motion by frame" in Path("out/report.html").read_text()


def redone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the names of movies that are computed from now on."""
    from frazil.jobs import motion

    names: list[str] = []
    work = motion._correct
    monkeypatch.setattr(motion, "_correct", lambda job, index, *rest: names.append(job.table.names[index]) or work(job, index, *rest))
    return names


def test_resume_redoes_what_is_missing_or_half_written(project: Path, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    command = [*COMMAND, "--aligned-frames", "--threads", "1"]
    assert main(command) == 0
    star = Path("out/Movies/a.star")
    good = {path: path.read_bytes() for path in Path("out/Movies").glob("a*")}
    table = Path("out/corrected_micrographs.star").read_bytes()
    assert {path.name for path in good} == {"a.mrc", "a_PS.mrc", "a_frames.mrcs", "a.star"}
    done = redone(monkeypatch)
    cuts = {**{path: [5000] for path in good}, star: [int(0.8 * len(good[star])), len(good[star]) - 3]}
    for path, lengths in cuts.items():
        for length in lengths:
            path.write_bytes(good[path][:length])
            assert main([*command, "--resume"]) == 0  # of a finished run
            assert done == ["Movies/a.tif"], (path, length)
            assert path.read_bytes()[1024:] == good[path][1024:]  # MRC headers say when they were written
            done.clear()
    Path("out/Movies/a_frames.mrcs").unlink()
    Path("out/corrected_micrographs.star").unlink()
    assert main([*command, "--resume"]) == 0
    assert done == ["Movies/a.tif"] and Path("out/corrected_micrographs.star").read_bytes() == table
    assert main([*command, "--resume"]) == 0
    assert done == ["Movies/a.tif"] and "2 of 2 movies are there and whole" in Path("out/log.txt").read_text()
    assert not [w for w in recwarn if "few values" in str(w.message)]


def test_hot_pixels_at_the_end_of_a_file_are_not_lost(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = frames(1)
    hot[:, 40, 50] = 200
    write_tiff("Movies/a.tif", hot)
    assert main(COMMAND) == 0
    star = Path("out/Movies/a.star")
    good = star.read_bytes()
    assert good.rindex(b"data_") == good.index(b"data_hot_pixels")
    star.write_bytes(good[: good.index(b"data_hot_pixels") - len(b"\n# version 30001\n\n")])  # cut between two blocks: nothing looks torn
    done = redone(monkeypatch)
    assert main([*COMMAND, "--resume"]) == 0
    assert done == ["Movies/a.tif"] and star.read_bytes() == good


def test_a_list_that_grew_is_gone_on_with_and_any_other_change_is_named(project: Path, monkeypatch, capsys) -> None:
    write_tiff("Movies/0.tif", frames(3))
    assert main(COMMAND) == 0
    done = redone(monkeypatch)
    again = [*COMMAND, "--resume"]
    listed(["Movies/0.tif", "Movies/a.tif", "Movies/b.mrcs"])  # sorted by name, as import lists them
    assert main(again) == 0 and done == ["Movies/0.tif"]
    assert [Path(name).stem for name in read_micrographs("out/corrected_micrographs.star").names] == ["0", "a", "b"]
    assert main(again) == 0 and done == ["Movies/0.tif"]
    capsys.readouterr()
    listed(["Movies/a.tif", "Movies/b.mrcs"])
    assert main(again) == 2
    said = capsys.readouterr().err
    assert "--movies" in said and "has changed since" in said and "1 of the 3 rows that it had are gone (first: Movies/0.tif)" in said
    listed(["Movies/0.tif", "Movies/a.tif", "Movies/b.mrcs"])
    movies = Path("movies.star")
    movies.write_text(movies.read_text().replace("200.0", "300.0"))
    assert main(again) == 2 and "row 1, Movies/0.tif: data_optics _rlnVoltage was 200.0 and is 300.0" in capsys.readouterr().err
    movies.write_text(movies.read_text().replace("300.0", "200.00"))  # the same number
    assert main(again) == 0 and done == ["Movies/0.tif"]
    listed(["Movies/0.tif", "Movies/a.tif", "Movies/b.mrcs", "More/b.mrcs"])
    assert main(again) == 0  # one more that is not there: left out, as others are
    listed(["Movies/0.tif", "Early/a.tif", "Movies/a.tif", "Movies/b.mrcs", "More/b.mrcs"])
    assert main(again) == 2 and "add rows at the end" in capsys.readouterr().err
    Path("out/list.copy").unlink()
    assert main(again) == 2 and "no copy of the old one" in capsys.readouterr().err


def test_movies_side_by_side_are_those_done_one_by_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frazil.jobs import motion

    names = [f"Movies/{k}.tif" for k in range(5)]
    for k, name in enumerate(names):
        write_tiff(name, frames(k))
    Path(names[1]).write_bytes(b"no movie")
    listed(names)
    seen: dict[str, list[int]] = {"together": [], "alone": []}
    find = motion._workers

    def counted(job, waiting) -> int:
        seen[job.run.path.name].append(find(job, waiting))
        return seen[job.run.path.name][-1]

    monkeypatch.setattr(motion, "_workers", counted)
    for name, memory in (("together", "5"), ("alone", "0.101")):
        # Four times 6 × 160 × 192 px fit into 5 GB but, if a pixel took ten thousand times as much, not one into 0.1.
        monkeypatch.setattr(motion, "BYTES_A_PIXEL", 8 if name == "together" else 10**6)
        assert main([*COMMAND[:3], name, *COMMAND[4:], "--threads", "3", "--memory", memory]) == 0
    assert seen == {"together": [3], "alone": [1]}
    both = [[read_motion(f"{name}/Movies/{k}.star").track for k in (0, 2, 3, 4)] for name in seen]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*both, strict=True))
    assert not torch.allclose(both[0][0], both[0][1], atol=1e-4)  # and each is its own
    tables = [read_micrographs(f"{name}/corrected_micrographs.star").names for name in seen]
    assert [Path(n).name for n in tables[0]] == [Path(n).name for n in tables[1]] == ["0.mrc", "2.mrc", "3.mrc", "4.mrc"]  # in order
    assert "Movies/1.tif" in Path("together/log.txt").read_text()


def test_dead_movies_are_listed_and_the_job_succeeds(project: Path, capsys) -> None:
    write_tiff("Movies/zero.tif", np.zeros((4, 40, 40), np.uint8))
    Path("Movies/cut.tif").write_bytes(Path("Movies/a.tif").read_bytes()[:9000])
    listed(["Movies/a.tif", "Movies/zero.tif", "Movies/cut.tif", "Movies/gone.tif"])
    assert main(COMMAND) == 0
    log, report = Path("out/log.txt").read_text(), Path("out/report.html").read_text()
    for name, said in (("zero.tif", "same value"), ("cut.tif", "truncated"), ("gone.tif", "no such file")):
        assert f"Movies/{name}" in log and said in log and name in report
    assert len(read_micrographs("out/corrected_micrographs.star")) == 1
    listed(["Movies/zero.tif"])
    assert main([*COMMAND[:3], "other", *COMMAND[4:]]) == 2
    assert "none of its 1 movies" in capsys.readouterr().err


def test_a_turned_gain_is_named(project: Path, capsys, rng: torch.Generator) -> None:
    gain = torch.exp(0.1 * torch.randn(SIZE, generator=rng))
    write_tiff("Movies/a.tif", frames(1, gain))
    listed(["Movies/a.tif"])
    write_mrc("right.mrc", gain, 1.0)
    write_mrc("wrong.mrc", gain.flip(0), 1.0)
    write_mrc("counts.mrc", 1 / gain, 1.0)
    write_mrc("small.mrc", gain[:80], 1.0)
    for name, said in (("wrong.mrc", "--gain-rotation 0 --gain-flip 1 does"), ("counts.mrc", "holds counts"), ("small.mrc", "frames of "
        "192 x 160")):
        assert main([*COMMAND, "--gain", name]) == 2
        assert said in capsys.readouterr().err
    assert main([*COMMAND, "--gain", "wrong.mrc", "--gain-flip", "1"]) == 0
    flat = read_mrc("out/Movies/a.mrc").data
    assert main([*COMMAND[:3], "plain", *COMMAND[4:]]) == 0
    assert flat.std() < read_mrc("plain/Movies/a.mrc").data.std()


def test_eer_with_a_note_on_what_is_left_over(project: Path, np_rng: np.random.Generator) -> None:
    side = 64
    pattern = 0.3 + 0.2 * np.sin(np.arange(side) / 3)[None] * np.cos(np.arange(side) / 4)[:, None]
    data = [b for _ in range(5) for b in events_of(np.minimum(np_rng.poisson(8 * pattern), 20), 20, np_rng)]
    data += events_of(np.zeros((side, side), int), 1, np_rng)
    write_eer("Movies/c.eer", data, (side, side))
    listed(["Movies/c.eer"])
    options = ["--dose", "0.1", "--patches", "1", "1", "--spectrum-size", "0", "--quiet", "--eer-grouping", "20", "--eer-upsampling", "2"]
    assert main([*COMMAND[:4], *options]) == 0
    assert read_header("out/Movies/c.mrc").shape == (1, 128, 128)
    general = read_motion("out/Movies/c.star").general
    assert general["rlnEERUpsampling"] == 2 and general["rlnEERGrouping"] == 20 and general["rlnMicrographDoseRate"] == pytest.approx(2.0)
    assert "the last 1 of 101 camera frames" in (log := Path("out/log.txt").read_text())
    # Listed without rlnEERUpsampling, as by RELION: the pixel size is that of the frames as drawn.
    assert "has no _rlnEERUpsampling, so 1.1 Å is taken for the pixel of the frames as drawn" in log
    assert read_header("out/Movies/c.mrc").pixel_size[0] == pytest.approx(1.1)


def test_pixels_of_eer_follow_the_upsampling(project: Path, np_rng: np.random.Generator, capsys) -> None:
    data = [b for _ in range(3) for b in events_of(np.minimum(np_rng.poisson(3, (64, 64)), 12), 12, np_rng)]
    write_eer("Movies/c.eer", data, (64, 64))
    assert main(["import", "Movies/c.eer", "--pixel-size", "1.5", "--settle", "0", "--output", "i", "--quiet"]) == 0
    options = ["--patches", "1", "1", "--spectrum-size", "0", "--quiet", "--eer-grouping", "12", "--bin", "2"]
    for upsampling, side, pixel in ((1, 32, 1.5), (2, 64, 0.75)):
        out = f"up{upsampling}"
        assert main(["motion", "i/movies.star", "--output", out, *options, "--eer-upsampling", str(upsampling)]) == 0
        header = read_header(f"{out}/Movies/c.mrc")
        assert header.shape == (1, side, side) and header.pixel_size[0] == pytest.approx(2 * pixel)  # the field stays 96 Å wide
        table = read_micrographs(f"{out}/corrected_micrographs.star")
        assert table.optics[0].pixel_size == pytest.approx(2 * pixel) and "rlnEERUpsampling" not in table.optics_table
        assert float(table.optics_table["rlnMicrographOriginalPixelSize"].iloc[0]) == pytest.approx(pixel)
        assert read_motion(f"{out}/Movies/c.star").general["rlnMicrographOriginalPixelSize"] == pytest.approx(pixel)
    assert "a pixel of 1.5 Å becomes 0.75 Å" in Path("up2/log.txt").read_text()
    listed(["Movies/c.eer", "Movies/a.tif"])
    assert main([*COMMAND, "--eer-upsampling", "2"]) == 2 and "lists EER movies and others" in capsys.readouterr().err


def test_what_is_refused(project: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(["Movies/a.tif"], group=7)
    assert main(COMMAND) == 2 and "optics group 7 is not in data_optics" in capsys.readouterr().err
    listed(["Movies/a.tif", "Movies/a.mrc"])
    assert main(COMMAND) == 2 and "would both become" in capsys.readouterr().err
    listed(["Movies/a.tif"])
    assert main([*COMMAND, "--patches", "0", "5"]) == 2

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("frazil.io.mrc._new_file", full)
    assert main([*COMMAND, "--device", "cpu"]) == 2  # a full disk ends the job, it is no fault of the movie
    assert "the disk is full" in capsys.readouterr().err


def test_flags() -> None:
    total = np.array([10.0, 11, 9, 10.5, 9.5, 80])
    assert flags(total).tolist() == [False] * 5 + [True]


def test_margins_of_plots_are_inches() -> None:
    _, axes = new_figure(6, 4, 2, 3, (0.6, 0.5, 0.15, 0.3))
    for row, column in ((0, 0), (1, 2)):
        box = axes[row, column].get_position()
        assert (6 * box.x0, 6 * box.x1) == pytest.approx((2 * column + 0.6, 2 * column + 2 - 0.15))
        assert (4 * box.y0, 4 * box.y1) == pytest.approx((2 * (1 - row) + 0.5, 2 * (1 - row) + 2 - 0.3))
