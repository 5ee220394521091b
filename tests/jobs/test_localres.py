"""frazil localres: its files, and what it refuses."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.jobs.halves import BOX, PIXEL, WRONG_HALVES, write_halves, write_wrong_mtfs

from frazil.cli import main
from frazil.data import Optics
from frazil.io.mrc import read_map
from frazil.io.particles import make_particle_set, write_particles
from frazil.io.star import read_star
from frazil.jobs.record import read_events
from frazil.maths.masks import radii
from frazil.simulate import Settings, phantom, simulate_particles

SMALL = ["--radius", "12", "--edge", "18", "--sampling", "18"]

pytestmark = pytest.mark.filterwarnings("ignore:Data array contains NaN")


@pytest.fixture
def halves(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Half maps and faulty ones in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_wrong_mtfs(tmp_path)
    return write_halves(tmp_path, rng)


def test_all_files_are_written_and_agree(halves, capsys) -> None:
    made = simulate_particles(phantom(16, 4.0), 300, [Optics(4.0, 16)], Settings(seed=1))
    write_particles("data.star", make_particle_set(made.particles, [f"{i + 1:06d}@x.mrcs" for i in range(300)]))
    command = ["localres", "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--particles", "data.star", "--output", "run", *SMALL]
    assert main(command) == 0
    resolution, filtered = (read_map(f"run/relion_locres{end}.mrc") for end in ("", "_filtered"))
    inside = radii(BOX, 3) < 9
    assert 2 * PIXEL <= float(resolution.data[inside].median()) < 15 and float(resolution.data.max()) <= 50.01
    assert filtered.data.shape == (BOX,) * 3 and resolution.pixel_size == pytest.approx(PIXEL)
    points = read_star("run/locres_points.star")["locres_points"]
    assert len(points) and points["rlnAngstromResolution"].min() >= 2 * PIXEL - 0.01
    volume = read_map("run/fsc3d.mrc").data
    assert volume[BOX // 2, BOX // 2, BOX // 2] == 1
    assert 0.5 < read_star("run/directional.star")["directional_general"]["frazilSphericity"] <= 1
    events = {e["event"]: e for e in read_events(Path("run"))}
    assert events["views"]["efficiency"] > 0.8 and events["localres"]["windows"] == len(points)
    assert {p.name for p in Path("run/plots").iterdir()} == {
        "locres.png", "histogram.png", "directional.png", "sphere_resolution.png", "sphere_views.png",
    }  # fmt: skip
    shown = capsys.readouterr()
    assert "efficiency of the views" in shown.out and "not masked" in shown.err


def test_without_mask_and_directions(halves) -> None:
    assert main(["localres", "half1.mrc", "--no-directional", "--output", "run", "--quiet", *SMALL]) == 0
    assert not Path("run/fsc3d.mrc").exists() and Path("run/relion_locres.mrc").exists()


@pytest.mark.parametrize("second, options, told", [
    *WRONG_HALVES,
    ("half2.mrc", ["--symmetry", "Q7"], "--symmetry"),
    ("half2.mrc", ["--edge", "80"], "larger than the box"),
    ("half2.mrc", ["--sampling", "1"], "less than a pixel"),
    ("half2.mrc", ["--particles", "nowhere.star"], "nowhere.star"),
    ("half2.mrc", ["--particles", "no_mtf.star"], "no_mtf.star"),
])  # fmt: skip
def test_mistakes_are_one_line(halves, capsys, second, options, told) -> None:
    assert main(["localres", "half1.mrc", second, *options, "--output", "run", "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1
