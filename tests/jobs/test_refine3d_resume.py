"""frazil refine3d interrupted: killed, stopped, out of disk; --resume gives the map that an uninterrupted run gives."""
from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from tests.jobs.refining import (
    HALVES,
    MAPS,
    assert_same_maps,
    command,
    density,
    iterations,
    no_pictures,
    nothing_half_written,
    refine,
    simulate,
)

import frazil.io.files as files
import frazil.jobs.refine3d as job
from frazil.cli import main
from frazil.io.particles import ANGLES
from frazil.io.star import read_star
from frazil.jobs.record import read_events, read_json
from frazil.jobs.run import Run
from frazil.maths.fsc import fsc

__all__ = ["no_pictures"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("refine3d") / "data")


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """An uninterrupted run."""
    return refine(data, data.parent / "whole")


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A frazil process."""
    return subprocess.Popen([sys.executable, "-m", "frazil", *words], env={**os.environ, **ONE_THREAD, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_a_killed_run_resumes_to_the_same_map(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(command(data, out))
    try:
        while len(iterations(out)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(random.Random(7).uniform(0.0, 0.1))  # somewhere in iteration 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 2 <= len(iterations(out)) < len(iterations(whole)) and not (out / "run_class001.mrc").exists()
    assert read_json(out / "state.json")["state"] == "running"  # kill -9 leaves no last word
    refine(data, out, "--resume")
    assert_same_maps(out, whole)
    for name in MAPS:
        assert fsc(density(out / name), density(whole / name)).min() > 0.999
    poses = [read_star(run / "run_data.star")["particles"][list(ANGLES)].to_numpy() for run in (out, whole)]
    assert abs(poses[0] - poses[1]).max() < 1e-5
    assert read_json(out / "state.json")["state"] == "done" and nothing_half_written(out)
    numbers = {event["iteration"] for event in iterations(out)}
    assert numbers == {event["iteration"] for event in iterations(whole)}


@pytest.mark.parametrize("moment", ["before the first checkpoint", "after the last iteration"])
def test_runs_cut_off_at_either_end_resume(data: Path, whole: Path, tmp_path: Path, moment: str, monkeypatch) -> None:
    class Killed(BaseException):
        """Stands for kill -9: nothing may be done about it."""

    def die(*arguments: object) -> None:
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("frazil.jobs.refine3d.refine3d" if moment.startswith("before") else "frazil.jobs.refine3d.write_results", die)
        with pytest.raises(Killed):
            main(command(data, out))
    state = read_json(out / "state.json")
    (out / "state.json").write_text(json.dumps({**state, "state": "running", "pid": 1 << 22}))
    (out / "RELION_JOB_EXIT_FAILURE").unlink()
    assert (out / "checkpoint.pt").exists() == (moment == "after the last iteration") and not (out / "run_class001.mrc").exists()
    refine(data, out, "--resume")
    assert_same_maps(out, whole)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch_and_says_how_to_resume(data, tmp_path, capsys, monkeypatch, number, code) -> None:
    out, calls = tmp_path / "run", []
    progress = Run.progress

    def signalled(self: Run, done: float, total: float, message: str = "") -> None:
        progress(self, done, total, message)
        calls.append((len(iterations(out)), done))
        if len(iterations(out)) == 1 and done < total / 2:
            os.kill(os.getpid(), number)

    words = command(data, out, "--gpu-memory", "12MB")
    monkeypatch.setattr("frazil.refine.planner.LEAST", 1 << 20)  # several batches a half set, of a set this small
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "progress", signalled)
        assert main(words) == code
    told = capsys.readouterr().err.splitlines()
    assert told == [f"stopped; continue with: frazil {' '.join(words)} --resume"]
    in_the_second = [done for iteration, done in calls if iteration == 1]
    assert len(in_the_second) == 1 and 0 < in_the_second[0] < 100  # the batch in work was ended, no other begun
    assert len(iterations(out)) == 1 and read_json(out / "state.json")["state"] == "stopped" and nothing_half_written(out)
    assert not list(out.glob("RELION_JOB_EXIT_*"))
    assert main([*words, "--resume"]) == 0
    assert_same_maps(out, refine(data, tmp_path / "uninterrupted", "--gpu-memory", "12MB"))


def test_a_resumed_run_works_in_as_much_memory_as_before(data: Path, tmp_path: Path, monkeypatch) -> None:
    budgets = []
    made = job.make_engine
    monkeypatch.setattr(job, "make_engine", lambda *a, **k: budgets.append(k["budget"]) or made(*a, **k))
    words = [word for word in command(data, tmp_path / "run") if word not in ("--gpu-memory", "1GB")]
    memory = namedtuple("memory", "available")
    for free, options in ((3 << 30, ("--iterations", "1")), (9 << 30, ("--iterations", "2", "--resume")), (1 << 29, ("--resume",))):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory(free))
        assert main([*words, *options]) == 0
    assert budgets == [1 << 30, 1 << 30, 1 << 28]  # the third time there is no longer room for it


def test_a_finished_run_is_left_as_it_is(data: Path, whole: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert main([word for word in command(data, whole, "--resume") if word != "--quiet"]) == 0
    assert "the refine3d run is finished already, nothing to do" in " ".join(capsys.readouterr().err.split())
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    assert main(command(data, whole)) == 2
    assert "holds a finished refine3d run: use --resume or another --output" in capsys.readouterr().err


@pytest.mark.parametrize("options, told", [
    (("--diameter", 130), "--diameter is 130.0 but the run was started with 120.0"),
    (("--seed", 2), "--seed is 2 but the run was started with 1"),
    (("--symmetry", "C2"), "--symmetry is C2 but the run was started with C1"),
    (("--pad", 1), "--pad is 1.0 but the run was started with 2.0"),
])  # fmt: skip
def test_other_parameters_are_refused(data: Path, whole: Path, capsys, options, told) -> None:
    before = read_events(whole)
    assert main(command(data, whole, "--resume", *options)) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1 and read_events(whole) == before


def test_another_star_file_is_refused(data: Path, whole: Path, capsys) -> None:
    assert main(command(data, whole, "--resume", star="truth.star")) == 2
    assert "the file of --particles," in capsys.readouterr().err


def test_a_particle_lost_since_is_noticed(data: Path, tmp_path: Path, capsys) -> None:
    out = refine(data, tmp_path / "run", "--iterations", 1)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint["particles"]["half"] = checkpoint["particles"]["half"][1:]
    torch.save(checkpoint, out / "checkpoint.pt")
    assert main(command(data, out, "--iterations", 2, "--resume")) == 2
    assert "checkpoint.pt has 199 particles, the input 200" in capsys.readouterr().err
    checkpoint["sampling"]["colour"] = 3
    checkpoint["particles"]["half"] = torch.ones(200, dtype=torch.int64)
    torch.save(checkpoint, out / "checkpoint.pt")
    assert main(command(data, out, "--iterations", 2, "--resume")) == 2
    assert "written by another version of frazil" in capsys.readouterr().err


# ---- a full disk


@pytest.mark.parametrize("name", ["checkpoint.pt", HALVES[1], "run_class001.mrc", "run_data.star", "run_sampling.star"])
def test_a_full_disk_leaves_nothing_half_written(data: Path, whole: Path, tmp_path: Path, capsys, monkeypatch, name: str) -> None:
    out, flush, written = tmp_path / "run", files._flush, []

    def full(path: Path) -> None:
        if path.name == f"{name}.tmp":
            written.append(path)
            if name != "checkpoint.pt" or len(written) == 3:
                path.write_bytes(path.read_bytes()[:1000])  # what there was room for
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        flush(path)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        assert main(command(data, out)) == 2
    shown = capsys.readouterr().err
    assert shown == f"error: {out / name}: cannot be written: the disk is full; free some space and start again\n"
    assert nothing_half_written(out) and read_json(out / "state.json")["state"] == "failed"
    assert (out / name).exists() == (name == "checkpoint.pt")  # of the iteration before
    refine(data, out, "--resume")
    assert_same_maps(out, whole)


def with_limit(words: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """A frazil process whose files may not grow beyond `limit` bytes: a write beyond it fails in the middle, as on a full disk."""
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    program = f"{limits}; import sys; from frazil.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, **ONE_THREAD}
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("options, name", [
    (("--write-iterations",), "run_it000_half1_class001.mrc"),
    ((), "checkpoint.pt"),
])  # fmt: skip
def test_writes_that_fail_in_the_middle(data: Path, tmp_path: Path, options, name) -> None:
    out = tmp_path / "run"
    done = with_limit(command(data, out, *options, "--iterations", 1), 100_000)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) == 1 and f"{out / name}: cannot be written" in done.stderr
    assert not (out / name).exists() and nothing_half_written(out)
