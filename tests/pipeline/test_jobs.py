"""`frazil simulate` and `frazil demo` as a user calls them, in one process."""
import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from frazil.cli import main
from frazil.io.mrc import read_map, read_stack
from frazil.io.particles import open_images, read_particles
from frazil.io.star import read_star
from frazil.jobs.simulate import Params, make

SMALL = ["--particles", "50", "--box", "32", "--pixel-size", "4", "--per-micrograph", "20", "--seed", "7", "--threads", "1"]


def simulate(folder: Path, *more: str) -> int:
    """Exit code of a small `frazil simulate` into `folder`."""
    return main(["simulate", "--output", str(folder), *SMALL, *more])


def test_files_hold_what_was_simulated(tmp_path, capsys):
    assert simulate(tmp_path / "a", "--optics-groups", "2", "--scale-sd", "0.1") == 0
    assert "50 particles of 32 px" in capsys.readouterr().out
    made = make(Params(particles=50, box=32, pixel_size=4.0, per_micrograph=20, optics_groups=2, scale_sd=0.1), seed=7)
    blind, true = (read_particles(tmp_path / "a" / name) for name in ("particles.star", "truth.star"))
    assert [o.box for o in blind.particles.optics] == [32, 36]
    assert_close(true.particles.rotation, made.particles.rotation, rtol=0, atol=1e-6)
    assert_close(true.particles.shift, made.particles.shift, rtol=0, atol=1e-5)
    assert_close(blind.particles.defocus, made.particles.defocus, rtol=0, atol=1e-6)
    assert blind.particles.micrographs == made.particles.micrographs
    images = open_images(blind)
    for g in range(2):
        index = torch.nonzero(made.particles.group == g)[:, 0]
        assert torch.equal(images[index], made.images[index])
    labels = set(read_star(tmp_path / "a" / "particles.star")["particles"].columns)
    assert not any(re.search("Angle(Rot|Tilt|Psi)|Origin|RandomSubset", label) for label in labels), "the answer is in the question"
    assert torch.equal(read_map(tmp_path / "a" / "reference.mrc").data, made.truth.data)
    low = read_map(tmp_path / "a" / "reference_lowpass.mrc").data
    ft = torch.fft.rfftn(low).abs()
    assert ft[0, 0, 6:].max() < 1e-4 * ft[0, 0, 0]  # 40 Å is shell 3.2 of a box of 128 Å
    assert (tmp_path / "a" / "RELION_JOB_EXIT_SUCCESS").exists()


def test_truth_in_particles_when_asked_for(tmp_path):
    assert simulate(tmp_path / "a", "--with-truth") == 0
    given, true = (read_particles(tmp_path / "a" / name).particles for name in ("particles.star", "truth.star"))
    assert_close(given.rotation, true.rotation)
    assert float((given.rotation[0] - given.rotation[1]).abs().max()) > 0.01


def test_stacks_are_found_from_anywhere(tmp_path, monkeypatch):
    """Inside the current folder they are named relative to it, as in a RELION project; outside in full."""
    monkeypatch.chdir(tmp_path)
    assert simulate(Path("project") / "a") == 0
    names = read_star(tmp_path / "project" / "a" / "particles.star")["particles"]["rlnImageName"]
    assert names[0] == "000001@project/a/stacks/mic0001.mrcs"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_images(read_particles(tmp_path / "project" / "a" / "particles.star"))[torch.arange(3)].shape == (3, 32, 32)
    assert simulate(tmp_path / "b") == 0
    assert str(tmp_path) in read_star(tmp_path / "b" / "particles.star")["particles"]["rlnImageName"][0]


def test_a_map_as_source(tmp_path):
    assert simulate(tmp_path / "a", "--snr", "inf") == 0
    assert simulate(tmp_path / "b", "--snr", "inf", "--map", str(tmp_path / "a" / "reference.mrc")) == 0
    exact, near = (read_stack(tmp_path / name / "stacks" / "mic0001.mrcs") for name in "ab")
    assert (near - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "more, word",
    [
        (["--box", "33"], "even"),
        (["--symmetry", "Q3"], "Q3"),
        (["--defocus-max", "100"], "--defocus-max"),
        (["--snr", "0"], "--snr"),
        (["--particles", "0"], "--particles"),
        (["--map", "nowhere.mrc"], "nowhere.mrc"),
    ],
)
def test_bad_wishes_are_one_line_and_exit_2(tmp_path, capsys, more, word):
    wishes = [w for w in SMALL if w not in ("--box", "32", "--particles", "50")] if more[0] in ("--box", "--particles") else SMALL
    assert main(["simulate", "--output", str(tmp_path / "a"), *wishes, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and "\n" not in said


def test_map_of_another_grid_is_refused(tmp_path, capsys):
    assert simulate(tmp_path / "a") == 0
    source = ["--map", str(tmp_path / "a" / "reference.mrc")]
    assert main(["simulate", "--output", str(tmp_path / "b"), "--box", "40", "--pixel-size", "4", *source]) == 2
    assert "box 32" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_says_how_near_the_truth_it_came(tmp_path, capsys):
    arguments = ["demo", "--output", str(tmp_path / "demo"), "--particles", "200", "--box", "32", "--pixel-size", "5", "--snr", "1"]
    arguments += ["--symmetry", "D2", "--seed", "3", "--threads", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "resolution by half maps" in said and "report.html" in said and "median error" in said
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert found["resolution"] < 20 and found["truth_05"] < 16 and found["angle"] < 5
    assert (tmp_path / "demo" / "refine3d" / "report.html").exists()
    # The truth written beside it is in the frame of the map that was found.
    final, moved = (read_map(tmp_path / "demo" / name).data for name in ("refine3d/run_class001.mrc", "truth_moved.mrc"))
    assert torch.corrcoef(torch.stack([final.flatten(), moved.flatten()]))[0, 1] > 0.85
    assert main(arguments) == 2 and "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
