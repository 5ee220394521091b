"""Movies decoded while torch loads: the same frames, nothing where it does not help, nothing said where it fails."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frazil.io.movies import open_movie, write_tiff
from frazil.jobs import ahead

TABLE = """
# version 30001
data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
og1 1

data_movies

loop_
_rlnOpticsGroup #1
_rlnMicrographMovieName #2
1 a.tif
# a comment
1 b.tif

1 c.tif
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ahead, "_begun", {})
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    rng = np.random.default_rng(1)
    for name in "ac":
        write_tiff(f"{name}.tif", rng.integers(0, 9, (3, 40, 50)).astype(np.uint8))
    Path("b.tif").write_bytes(Path("a.tif").read_bytes()[:900])
    Path("movies.star").write_text(TABLE)
    return tmp_path


def test_names_of_a_table(project: Path) -> None:
    assert ahead.movie_names(Path("movies.star"), 2) == [Path("a.tif"), Path("b.tif")]
    assert len(ahead.movie_names(Path("movies.star"), 9)) == 3
    Path("other.star").write_text("data_x\nloop_\n_rlnImageName #1\na.tif\n")
    assert ahead.movie_names(Path("other.star"), 2) == []


def test_frames_decoded_ahead_are_given_once(project: Path) -> None:
    ahead.begin(["motion", "--dose", "1", "movies.star"])
    assert set(ahead._begun) == {project / "a.tif", project / "b.tif"}
    movie = open_movie("a.tif")
    asked: list[tuple[int, int]] = []

    def decode(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return movie.decode(start, stop)

    made = ahead._begun[project / "a.tif"]
    made.result()
    first = ahead.decoding(Path("a.tif"), decode)
    assert np.array_equal(first(0, 3), movie.decode(0, 3)) and not asked
    assert np.array_equal(first(0, 3), movie.decode(0, 3)) and np.array_equal(first(1, 2), movie.decode(1, 2))
    assert asked == [(0, 3), (1, 2)] and ahead.decoding(Path("a.tif"), decode) is decode
    # b is cut off: nothing is said, whoever decodes it later says so.
    ahead._begun[project / "b.tif"].result()
    other = ahead.decoding(Path("b.tif"), decode)
    assert np.array_equal(other(0, 2), movie.decode(0, 2)) and asked[-1] == (0, 2)


@pytest.mark.parametrize("arguments", [["ctf", "movies.star"], ["motion", "movies.star", "--resume"], ["motion", "none.star"], [],
                                       ["motion", "movies.star", "--memory=2"], ["motion", "--help"]])  # fmt: skip
def test_nothing_is_begun(project: Path, arguments: list[str]) -> None:
    ahead.begin(arguments)
    assert not ahead._begun


def test_no_torch(project: Path) -> None:
    Path("b.tif").unlink()
    code = ("import sys\nfrom frazil.jobs import ahead\nahead.begin(['motion', 'movies.star'])\n"
            "assert list(ahead._begun.values())[0].result().shape == (3, 40, 50) and 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
