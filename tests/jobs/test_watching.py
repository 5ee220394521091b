"""frazil localres, postprocess and mask killed in the middle: --resume goes on from what was finished and gives the same files."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.jobs.halves import write_halves

from frazil.cli import main
from frazil.jobs.record import read_json
from frazil.jobs.run import Run
from frazil.steps.localres import BATCH_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:Data array contains NaN")  # one of the faulty maps of `write_halves`
LOCALRES = ["localres", "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--radius", "9", "--edge", "15", "--sampling", "9"]
POSTPROCESS = ["postprocess", "half1.mrc", "--mask", "mask.mrc"]
# A process that kills itself after so many checkpoints that hold something of a name; cubes are treated a few at a time.
KILLED = """
import os, signal, sys
import frazil.jobs.watching, frazil.steps.localres
from frazil.cli import main
from frazil.jobs.run import Run
frazil.jobs.watching.INTERVAL = 0.0
frazil.steps.localres.BATCH_BYTES["cpu"] = 1 << 20
save, left = Run.save_checkpoint, [int(sys.argv[2])]
def last(run, state, name="checkpoint.pt"):
    save(run, state, name)
    left[0] -= sys.argv[1] in state["kept"]
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Run.save_checkpoint = last
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def whole(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with half maps, the current one; cubes are treated as in the killed process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1 << 20)
    write_halves(tmp_path, rng)
    return tmp_path


def kill(command: list[str], name: str, after: int) -> None:
    """Run a command in a process that dies after so many checkpoints with `name`."""
    done = subprocess.run([sys.executable, "-c", KILLED, name, str(after), *command], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = read_json(Path(command[-1]) / "state.json")
    assert state is not None and state["state"] == "running"


def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What a run in this process says of its progress from now on."""
    said: list[tuple[str, float]] = []
    progress = Run.progress

    def listen(run: Run, done: float, total: float, message: str = "") -> None:
        said.append((message, done))
        progress(run, done, total, message)

    monkeypatch.setattr(Run, "progress", listen)
    return said


def same(names: list[str]) -> bool:
    """Whether files of both runs are the same, byte by byte from the pixels on."""
    return all(Path(f"run/{n}").read_bytes()[1024:] == Path(f"other/{n}").read_bytes()[1024:] for n in names)


@pytest.mark.parametrize("block", ["windows", "random phases"])
def test_localres_goes_on_after_the_windows_it_has(block: str, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    kill([*LOCALRES, "--threads", "1", "--output", "run"], block, 2)
    kept = torch.load("run/checkpoint.pt", weights_only=True)["kept"]
    assert list(kept)[-1] == block
    said = told(monkeypatch)
    assert main([*LOCALRES, "--threads", "1", "--output", "run", "--resume"]) == 0
    assert "finished before: windows" in capsys.readouterr().err
    measured = [done for what, done in said if what == block]
    assert measured and measured[0] > len(kept[block]) > 0, "blocks that were there were measured again"
    assert block == "windows" or not any(what == "windows" for what, _ in said)
    assert main([*LOCALRES, "--threads", "1", "--output", "other", "--quiet"]) == 0
    assert same(["relion_locres.mrc", "relion_locres_filtered.mrc", "fsc3d.mrc"])
    assert Path("run/locres_points.star").read_text().split("data_")[1] == Path("other/locres_points.star").read_text().split("data_")[1]


@pytest.mark.parametrize("block", ["curves", "independence"])
def test_postprocess_goes_on_after_its_curves(block: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill([*POSTPROCESS, "--threads", "1", "--output", "run"], block, 1)

    def refuse(*words: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr("frazil.steps.postprocess.compare_halves", refuse)
        if block == "independence":
            patched.setattr("frazil.steps.postprocess.measure_independence", refuse)
        assert main([*POSTPROCESS, "--threads", "1", "--output", "run", "--resume", "--quiet"]) == 0
    assert main([*POSTPROCESS, "--threads", "1", "--output", "other", "--quiet"]) == 0
    assert same(["postprocess.mrc", "postprocess_masked.mrc", "postprocess_fsc.xml", "postprocess_fsc.dat"])
    stars = [Path(f"{run}/postprocess.star").read_text().replace(f"{run}/", "") for run in ("run", "other")]
    assert [line.split() for line in stars[0].splitlines()] == [line.split() for line in stars[1].splitlines()]


def test_a_second_half_found_by_name_that_changed_is_noticed(whole: Path, capsys) -> None:
    """The run compares the files that were named; the second half map was not."""
    kill([*POSTPROCESS, "--output", "run"], "curves", 1)
    os.utime("half2.mrc", ns=(1, 1))
    assert main([*POSTPROCESS, "--output", "run", "--resume"]) == 0
    assert "begins anew" in capsys.readouterr().err


def test_a_mask_is_made_anew_and_says_so(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["mask", "half1.mrc", "--threshold", "0.5", "--output", "run"]
    with monkeypatch.context() as patched:
        patched.setattr("frazil.jobs.mask.report", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, "--quiet"]) != 0
    assert main([*command, "--resume"]) == 0
    assert "made anew" in capsys.readouterr().err
    assert main([*command[:-1], "other", "--quiet"]) == 0
    assert same(["mask.mrc"])
