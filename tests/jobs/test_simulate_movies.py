"""frazil simulate-movies: containers, truth that motion correction finds, places that picking is measured with."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.coordinates import read_coordinates
from frazil.io.gain import read_gain
from frazil.io.movie_table import read_motion, read_movies
from frazil.io.movies import open_movie
from frazil.io.star import read_star

SIZE = ["--size", "160", "128", "--pixel-size", "2", "--box", "48", "--particles", "8", "--frames", "6", "--quiet"]


def made(output: str, *options: str) -> int:
    return main(["simulate-movies", *SIZE, *options, "--output", output])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_motion_finds_the_true_track(here: Path) -> None:
    assert made("sim", "--movies", "1", "--dose", "6", "--contrast", "4", "--local", "0", "--drift", "5", "--gain-sd", "0.1") == 0
    options = ["--gain", "sim/gain.mrc", "--dose", "6", "--patches", "1", "1", "--spectrum-size", "0", "--quiet", "--threads", "1"]
    assert main(["motion", "sim/movies.star", "--output", "m", *options]) == 0
    truth, found = read_motion("sim/truth/mov0001.star"), read_motion("m/sim/movies/mov0001.star")
    assert float(truth.track[-1].norm()) == pytest.approx(5, abs=0.5)
    difference = found.track - truth.track
    assert float((difference - difference.mean(0)).norm(dim=1).max()) < 0.3
    hot = {tuple(xy) for xy in truth.hot.tolist()}
    assert len(hot) == 20 and len(hot & {tuple(xy) for xy in found.hot.tolist()}) > 17


def test_containers_hold_the_same_counts_and_the_truth_is_complete(here: Path) -> None:
    frames, doses = {}, ["--dose", "2", "--movies", "2"]
    for container in ("tif", "mrc", "eer"):
        assert made(container, "--container", container, *doses) == 0
        table = read_movies(f"{container}/movies.star")
        assert table.names[1] == f"{container}/movies/mov0002.{container}" and table.optics[0].pixel_size == 2
        movie = open_movie(table.file(0), grouping=32)
        assert movie.shape == (6, 128, 160)
        frames[container] = movie.load(0, 6).long()
        given = read_gain(f"{container}/gain.mrc", eer=container == "eer")
        assert int((given == 0).sum()) == 5 and float((frames[container].sum(0)[given == 0]).max()) == 0
        flat = (frames[container].sum(0) * given)[given > 0]
        assert float(flat.median()) == pytest.approx(2 * 4 * 6 * float(given[given > 0].mean()), rel=0.1)
    assert torch.equal(frames["tif"], frames["mrc"]) and torch.equal(frames["tif"].clamp(max=32), frames["eer"])
    star = read_star("tif/truth/mov0001.star")
    local = star["local_shift"]
    assert len(local) == 6 * 49 and float(np.hypot(local["rlnMicrographShiftX"], local["rlnMicrographShiftY"])[:49].max()) < 1e-9
    assert star["general"]["rlnDefocusU"] - star["general"]["rlnDefocusV"] == pytest.approx(300) and len(star["dead_pixels"]) == 5
    mean = local.groupby("rlnMicrographFrameNumber")["rlnMicrographShiftX"].mean().to_numpy()
    assert np.allclose(mean, star["global_shift"]["rlnMicrographShiftX"])
    assert local[local["rlnMicrographFrameNumber"] == 6]["rlnMicrographShiftX"].std() > 0.05
    places = read_coordinates("tif/truth.star")
    assert list(places) == ["tif/movies/mov0001.tif", "tif/movies/mov0002.tif"] and len(places["tif/movies/mov0001.tif"]) == 8
    assert (Path("tif") / "movies" / "mov0001.tif").read_bytes() != (Path("tif") / "movies" / "mov0002.tif").read_bytes()


def test_a_stopped_run_goes_on(here: Path) -> None:
    assert made("sim") == 0
    first, second = (Path(f"sim/movies/mov000{k}.tif") for k in (1, 2))
    whole, kept = second.read_bytes(), first.stat().st_mtime_ns
    for name in ("RELION_JOB_EXIT_SUCCESS", "truth/mov0002_particles.star", "movies.star"):
        (Path("sim") / name).unlink()
    second.write_bytes(b"half")
    Path("sim/state.json").write_text('{"state": "stopped"}')
    assert made("sim", "--resume") == 0
    assert second.read_bytes() == whole and first.stat().st_mtime_ns == kept and len(read_movies("sim/movies.star").names) == 2


def test_damage_can_be_left_out_and_bad_input_is_one_line(here: Path, capsys) -> None:
    late = {}
    for option in ("--damage", "--no-damage"):
        assert made(option[2:], option, "--movies", "1", "--dose", "30", "--contrast", "8", "--gain-sd", "0", "--hot-pixels", "0") == 0
        movie = open_movie(f"{option[2:]}/movies/mov0001.tif")
        late[option] = float(movie.load(5, 6).float().var() / movie.load(5, 6).float().mean())
    assert late["--no-damage"] > 1.2 * late["--damage"]
    small = [word if word != "48" else "200" for word in SIZE]
    assert main(["simulate-movies", *small, "--output", "no"]) == 2 and "holds no particles in boxes of 200 px" in capsys.readouterr().err
    assert made("no2", "--defocus-min", "30000") == 2 and "--defocus-max 20000 is below" in capsys.readouterr().err
