"""frazil project and frazil reconstruct are each other's inverse, through files; their mistakes are one line."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_map, read_stack, write_mrc
from frazil.io.particles import read_particles, write_particles
from frazil.io.star import read_star, write_star
from frazil.jobs.record import read_events
from frazil.maths.fsc import fsc

BOX, PIXEL = 24, 3.0
FAST = ["--device", "cpu", "--threads", "1", "--quiet"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """map.mrc: three Gaussians; p.mrcs and p.star: 150 projections, halves 1 and 2 in turn."""
    monkeypatch.chdir(tmp_path)
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    blobs = ((3, -2, 1), (-3, 1, 3), (0, 3, -4))
    write_mrc("map.mrc", sum(torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 3) for a, b, c in blobs), PIXEL)
    assert main(["project", "map.mrc", "--number", "150", "--output", "p.mrcs"]) == 0
    made = read_particles("p.star")
    write_particles("p.star", made, extra={"rlnRandomSubset": torch.arange(150) % 2 + 1})
    return tmp_path


def test_reconstruct_gives_the_projected_map_back(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_stack("p.mrcs").shape == (150, BOX, BOX)
    assert main(["reconstruct", "p.star", "--no-ctf", "--output", "rec", *FAST]) == 0
    found = read_map("rec/reconstruction.mrc")
    assert found.pixel_size == pytest.approx(PIXEL)
    assert fsc(found.data, read_map("map.mrc").data)[1:9].min() > 0.99
    assert read_events(Path("rec"))[-1]["event"] == "done"


def test_the_halves_are_separate_and_resume_keeps_what_is_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reconstruct", "p.star", "--no-ctf", "--half", "halves", "--output", "rec", "--device", "cpu", "--threads", "1"]
    assert main(command) == 0
    assert "halves agree to" in capsys.readouterr().out
    a, b = (read_map(f"rec/reconstruction_half{h}.mrc").data for h in (1, 2))
    assert not torch.equal(a, b)
    first = Path("rec/reconstruction_half1.mrc").stat().st_mtime_ns
    Path("rec/reconstruction_half2.mrc").unlink()
    Path("rec/state.json").write_text("{}")  # as if it had been killed in the second half
    assert main([*command, "--resume"]) == 0
    assert Path("rec/reconstruction_half1.mrc").stat().st_mtime_ns == first
    assert torch.equal(read_map("rec/reconstruction_half2.mrc").data, b)


def test_projecting_at_the_poses_of_a_star_file_repeats_them(world: Path) -> None:
    assert main(["project", "map.mrc", "--star", "p.star", "--output", "q.mrcs"]) == 0
    assert torch.allclose(read_stack("q.mrcs"), read_stack("p.mrcs"), atol=1e-5)
    assert main(["project", "map.mrc", "--angles", "0", "0", "0", "10", "20", "30", "--output", "two.mrcs"]) == 0
    assert read_stack("two.mrcs").shape[0] == 2
    angles = read_particles("two.star").table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].iloc[1].astype(float).tolist()
    assert angles == pytest.approx([10, 20, 30], abs=1e-6)


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_constant_images_are_left_out_and_counted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = read_stack("p.mrcs")
    stack[4] = 0
    stack[7, 3, 3] = float("nan")
    write_mrc("p.mrcs", stack, PIXEL, stack=True)
    assert main(["reconstruct", "p.star", "--no-ctf", "--output", "rec", *FAST]) == 0
    assert [e["message"] for e in read_events(Path("rec")) if e["event"] == "warning"][0].startswith("2 of 150 particles")
    assert bool(torch.isfinite(read_map("rec/reconstruction.mrc").data).all())


def edited(change) -> None:
    """p.star with its particle table changed."""
    blocks = read_star("p.star", text=True)
    blocks["particles"] = change(blocks["particles"])
    write_star("bad.star", blocks)


@pytest.mark.parametrize("change, options, told", [
    (lambda t: t, ["--symmetry", "Q7"], "--symmetry"),
    (lambda t: t.drop(columns=["rlnDefocusU"]), [], "_rlnDefocusU is missing"),
    (lambda t: t.assign(rlnAngleRot="0", rlnAngleTilt="0", rlnAnglePsi="0"), ["--no-ctf"], "same orientation"),
    (lambda t: t.assign(rlnImageName="000999@p.mrcs"), ["--no-ctf"], "999"),
    (lambda t: t.assign(rlnImageName="000001@gone.mrcs"), ["--no-ctf"], "gone.mrcs"),
    (lambda t: t.drop(columns=["rlnRandomSubset"]), ["--no-ctf", "--half", "1"], "_rlnRandomSubset 1"),
    (lambda t: t.iloc[:0], ["--no-ctf"], "no particles"),
])  # fmt: skip
def test_mistakes_are_one_line(world: Path, capsys, change, options, told) -> None:
    edited(change)
    assert main(["reconstruct", "bad.star", "--output", "rec", *FAST, *options]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize("options, told", [
    ([], "give one of --star, --angles and --number"),
    (["--number", "3", "--star", "p.star"], "give one of"),
    (["--angles", "1", "2"], "triples"),
    (["--number", "3", "--ctf"], "--ctf needs --star"),
])  # fmt: skip
def test_project_mistakes_are_one_line(world: Path, capsys, options, told) -> None:
    capsys.readouterr()
    assert main(["project", "map.mrc", "--output", "x.mrcs", *options]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1 and not Path("x.mrcs").exists()
