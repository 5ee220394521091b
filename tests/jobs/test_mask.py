"""frazil mask: its files, sources and set operations, and what it refuses."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.jobs.record import read_events
from frazil.maths.masks import radii, soft_sphere

BOX, PIXEL = 40, 2.0


@pytest.fixture
def ball(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """map.mrc, a ball of radius 10 px in noise, and maps that do not fit."""
    monkeypatch.chdir(tmp_path)
    data = soft_sphere(BOX, 10, 3) + 0.03 * torch.randn(BOX, BOX, BOX, generator=rng)
    write_mrc("map.mrc", data, PIXEL)
    write_mrc("half.mrc", data * (torch.arange(BOX) < BOX // 2), PIXEL)
    write_mrc("small.mrc", data[:32, :32, :32], PIXEL)
    write_mrc("coarse.mrc", data, 3.0)
    write_mrc("flat.mrc", torch.ones(BOX, BOX, BOX), PIXEL)
    return data


def test_mask_of_a_map(ball, capsys) -> None:
    assert main(["mask", "map.mrc", "--threshold", "0.5", "--lowpass", "0", "--extend", "2", "--edge", "4", "--output", "run"]) == 0
    made = read_map("run/mask.mrc")
    assert made.pixel_size == pytest.approx(PIXEL) and float(made.data.max()) == 1 and float(made.data.min()) == 0
    inside = float((made.data == 1).sum())
    assert 4 / 3 * math.pi * 12.5**3 < inside < 4 / 3 * math.pi * 14**3  # 0.5 is at 11.5 px, growth takes less than 2 more
    event = next(e for e in read_events(Path("run")) if e["event"] == "mask")
    assert event["volume"] == pytest.approx(inside * PIXEL**3) and event["proposals"]["knee"] > 0
    assert "proposed" in capsys.readouterr().out
    assert {p.name for p in Path("run/plots").iterdir()} == {"threshold.png", "mask.png"} and Path("run/report.html").exists()


@pytest.mark.parametrize("options", [[], ["--mass", "30"]])
def test_the_proposed_threshold_keeps_the_ball_and_no_noise(ball, options) -> None:
    assert main(["mask", "map.mrc", *options, "--lowpass", "8", "--extend", "0", "--edge", "0", "--output", "run", "--quiet"]) == 0
    made = read_map("run/mask.mrc").data > 0
    r = radii(BOX, 3)
    assert made[r < 8].all() and float(made[r > 15].double().mean()) < 0.001


def test_sphere_shell_and_sets(ball) -> None:
    grid = ["--box", str(BOX), "--pixel-size", str(PIXEL), "--extend", "0", "--edge", "0", "--quiet"]
    assert main(["mask", "--radius", "10", "--inner-radius", "5", *grid, "--output", "shell"]) == 0
    r = radii(BOX, 3)
    assert torch.equal(read_map("shell/mask.mrc").data > 0, (r <= 10) & (r >= 5))
    assert main(["mask", "--radius", "6", "--centre", "4", "0", "-2", *grid, "--output", "moved"]) == 0
    where = read_map("moved/mask.mrc").data.nonzero().double().mean(0) - BOX // 2
    assert where.tolist() == pytest.approx([-2, 0, 4])  # zyx
    cut = ["--threshold", "0.5", "--lowpass", "0", "--extend", "0", "--edge", "0", "--quiet"]
    for operation, share in (("and", 0.5), ("and-not", 0.5), ("or", 1.0)):
        assert main(["mask", "map.mrc", "--combine", "half.mrc", "--operation", operation, *cut, "--output", operation]) == 0
        full = float((ball >= 0.5).sum())
        assert float(read_map(f"{operation}/mask.mrc").data.sum()) / full == pytest.approx(share, abs=0.06)


def write_model(path: str, shift: float = 0.0) -> None:
    """Five carbon atoms on a line along x, 4 Å apart, the middle one at (shift, shift, shift)."""
    line = "ATOM  {n:5d}  CA  ALA A{n:4d}    {x:8.3f}{y:8.3f}{y:8.3f}  1.00 20.00           C  "
    Path(path).write_text("\n".join(line.format(n=n + 1, x=shift + 4 * (n - 2), y=shift) for n in range(5)) + "\nEND\n")


def test_mask_of_a_model(ball, capsys) -> None:
    write_model("model.pdb", 40.0)
    common = ["--model", "model.pdb", "--extend", "0", "--edge", "0", "--quiet"]
    assert main(["mask", "map.mrc", *common, "--output", "run"]) == 0  # the map's first voxel is at (0, 0, 0)
    made = read_map("run/mask.mrc").data
    assert made[20, 20, 16:25].all() and not made[20, 20, :14].any() and not made[23, 20].any()
    assert main(["mask", *common, "--box", "32", "--pixel-size", "2", "--output", "centred"]) == 0
    assert read_map("centred/mask.mrc").data[16, 16, 12:21].all()
    write_model("far.pdb", 400.0)
    assert main(["mask", "map.mrc", "--model", "far.pdb", "--output", "far", "--quiet"]) == 2
    assert "outside the map" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["map.mrc", "--threshold", "50"], "above the highest density"),
    (["map.mrc", "--combine", "small.mrc"], "small.mrc: box 32 px"),
    (["map.mrc", "--combine", "coarse.mrc"], "coarse.mrc: pixel size 3 Å"),
    (["flat.mrc"], "same value"),
    (["nowhere.mrc"], "no such file"),
    ([], "give a map"),
    (["--radius", "5"], "--box and --pixel-size"),
    (["map.mrc", "--radius", "5", "--inner-radius", "6"], "not smaller"),
    (["map.mrc", "--box", "32"], "its own box"),
    (["map.mrc", "--model", "nowhere.pdb"], "nowhere.pdb"),
    (["map.mrc", "--combine", "half.mrc", "--operation", "xor"], "--operation"),
    (["map.mrc", "--edge", "-1"], "--edge"),
])  # fmt: skip
def test_mistakes_are_one_line(ball, capsys, words, told) -> None:
    assert main(["mask", *words, "--output", "run", "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1, shown


def test_nothing_left_and_odd_headers(ball, capsys) -> None:
    write_mrc("other.mrc", ball.roll(18, 0) * 0, PIXEL)
    assert main(["mask", "map.mrc", "--threshold", "0.5", "--combine", "other.mrc", "--output", "a", "--quiet"]) == 2
    assert "nothing is left" in capsys.readouterr().err
    write_mrc("bare.mrc", ball, 0.0)
    assert main(["mask", "bare.mrc", "--output", "b", "--quiet"]) == 2
    assert "no pixel size" in capsys.readouterr().err
    assert main(["mask", "bare.mrc", "--pixel-size", "2", "--output", "c", "--quiet"]) == 0
    import mrcfile

    with mrcfile.open("map.mrc", "r+") as file:  # axes as others write them: columns are z
        file.header.mapc, file.header.mapr, file.header.maps = 3, 2, 1
    assert main(["mask", "map.mrc", "--output", "d", "--quiet"]) == 0
    with mrcfile.open("map.mrc", "r+") as file:
        file.voxel_size = np.rec.array((2.0, 2.0, 2.5), dtype=file.voxel_size.dtype)
    assert main(["mask", "map.mrc", "--output", "e", "--quiet"]) == 2
    assert "differ along x, y, z" in capsys.readouterr().err
