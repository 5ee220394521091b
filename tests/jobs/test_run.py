"""The run directory: what it records, what it refuses, and that stopping or killing a run loses nothing."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.jobs import counting

from frazil.data import BadInput
from frazil.jobs.record import END, checksum, read_events
from frazil.jobs.run import Options, Run, Stopped, cpu_threads, execute, parse_memory, resolve_device, spoken_time


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.star"
    path.write_text("data_\n")
    return path


def start(table: Path, output: Path, resume: bool = False, seed: int = 1, **params) -> Run:
    options = Options(output=output, device="cpu", threads=1, seed=seed, resume=resume, quiet=True)
    return execute("counting", counting.run, counting.Params(table=table, **params), options)


def state_of(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())


def expected_sum(items: int, seed: int = 1) -> float:
    return sum(float(torch.rand((), generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)) for i in range(items))


def test_a_run_records_itself(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(table, out, items=3)
    job = json.loads((out / "job.json").read_text())
    assert job["job"] == "counting" and job["seed"] == 1 and job["device"] == "cpu"
    assert job["parameters"] == {"table": str(table), "items": 3, "pause": 0.0, "extra": 0, "trouble": ""}
    assert job["inputs"]["table"] == {"path": str(table), "checksum": checksum(table)}
    state = state_of(out)
    assert state["state"] == "done" and state["progress"] == 1.0 and abs(state["heartbeat"] - time.time()) < 60
    events = read_events(out)
    assert [e["event"] for e in events] == ["started", "item", "item", "item", "done"]
    assert events[1]["bad"] is None and events[3]["sum"] == pytest.approx(expected_sum(3), abs=1e-12)
    assert (out / "RELION_JOB_EXIT_SUCCESS").exists() and not (out / "RELION_JOB_EXIT_FAILURE").exists()
    assert "sum" in (out / "log.txt").read_text()
    assert not list(out.glob("*.tmp"))


def test_a_directory_with_a_run_is_refused_without_resume(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(table, out)
    with pytest.raises(BadInput, match="holds a finished counting run: use --resume or another --output"):
        start(table, out)
    before = read_events(out)
    assert start(table, out, resume=True).finished
    assert read_events(out) == before


def test_a_finished_run_names_the_files_it_has_lost(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    start(table, out)
    options = Options(output=out, device="cpu", resume=True, seed=1)

    def said() -> str:
        assert execute("counting", counting.run, counting.Params(table=table), options).finished
        return " ".join(capsys.readouterr().err.split())

    (out / "checkpoint.pt").unlink()  # nobody goes on from a finished run
    (out / "log.txt").unlink()
    assert said().endswith("the counting run is finished already, nothing to do")
    (out / "sum.txt").write_text("1")
    assert "nothing to do warning: since then 1 of its files were lost: sum.txt is not whole (1 of " in said()
    (out / "sum.txt").unlink()
    assert "sum.txt is missing; to make them again give another --output" in said()
    (out / "outputs.json").unlink()  # a run of an earlier version
    assert said().endswith("nothing to do")


def test_an_input_that_changed_in_its_place_is_said_so(table: Path, tmp_path: Path) -> None:
    start(table, tmp_path / "run")
    table.write_text(table.read_text() + "# changed\n")
    with pytest.raises(BadInput, match=r"--table, .*, has changed since the run was started; restore it or give another"):
        start(table, tmp_path / "run", resume=True)


def test_directories_that_hold_something_else_are_refused(table: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="is not empty and holds no frazil run"):
        start(table, tmp_path / "mine")
    with pytest.raises(BadInput, match="is a file"):
        start(table, table)
    start(table, tmp_path / "run")
    with pytest.raises(BadInput, match="holds a counting run, not a fsc run"):
        with Run("fsc", counting.Params(table=table), Options(output=tmp_path / "run", device="cpu", quiet=True, resume=True)):
            pass


def test_resume_on_a_new_or_empty_directory_starts(table: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        run = start(table, tmp_path / name, resume=True)
        assert not run.resumed and state_of(tmp_path / name)["state"] == "done"


def stop_after(table: Path, out: Path, item: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Run five items with a signal sent to this process when `item` is done."""
    note = Run.event

    def event(self: Run, kind: str, **values) -> None:
        note(self, kind, **values)
        if values.get("item") == item:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "event", event)
        start(table, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_batch_and_resume_gives_the_same_result(table, tmp_path, monkeypatch, number) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        stop_after(table, out, 2, monkeypatch, number)
    assert stopped.value.signal == number and signal.getsignal(number) is before
    assert state_of(out)["state"] == "stopped"
    assert not list(out.glob("RELION_JOB_EXIT_*"))
    with pytest.raises(BadInput, match="an unfinished counting run: use --resume"):
        start(table, out)
    assert start(table, out, resume=True).resumed
    assert float((out / "sum.txt").read_text()) == expected_sum(5)
    assert [e["item"] for e in read_events(out) if e["event"] == "item"] == [0, 1, 2, 3, 4]


def test_a_killed_run_resumes_and_a_live_one_is_left_alone(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    params = counting.Params(table=table, pause=0.05, items=30)
    options = Options(output=out, device="cpu", threads=1, seed=1, quiet=True)
    command = [sys.executable, "-m", "tests.jobs.counting", params.model_dump_json(), options.model_dump_json()]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while len(read_events(out)) < 4:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        with pytest.raises(BadInput, match=f"still running .process {process.pid}"):
            start(table, out, resume=True, items=30, pause=0.05)
    finally:
        process.kill()
        process.wait()
    assert state_of(out)["state"] == "running"  # kill -9 leaves no last word
    with open(out / "events.jsonl", "a") as file:
        file.write('{"event": "item", "it')  # nor a finished line
    assert start(table, out, resume=True, items=30, pause=0.05).resumed
    assert float((out / "sum.txt").read_text()) == pytest.approx(expected_sum(30), abs=1e-12)
    for line in (out / "events.jsonl").read_text().splitlines():
        json.loads(line)


def test_resume_with_other_parameters_names_the_parameter(table, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        stop_after(table, out, 1, monkeypatch)
    with pytest.raises(BadInput, match="--items is 7 but the run was started with 5"):
        start(table, out, resume=True, items=7)
    with pytest.raises(BadInput, match="--seed is 2 but the run was started with 1"):
        start(table, out, resume=True, seed=2)
    other = tmp_path / "elsewhere.star"
    other.write_text("data_other\n")
    with pytest.raises(BadInput, match="--table, .*elsewhere.star, is not the one"):
        start(other, out, resume=True)
    other.write_bytes(table.read_bytes())  # the same content at another path is the same input
    assert start(other, out, resume=True).resumed


def test_a_parameter_that_may_change_continues_a_finished_run(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(table, out, items=3)
    assert start(table, out, resume=True, items=3, extra=2).resumed
    assert float((out / "sum.txt").read_text()) == expected_sum(5)
    assert json.loads((out / "job.json").read_text())["parameters"]["extra"] == 2
    assert start(table, out, resume=True, items=3, extra=2).finished


def test_a_run_that_failed_before_it_made_anything_may_be_repeated(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(BadInput, match="row 3"):
        start(table, out, trouble="bad input")
    assert state_of(out)["state"] == "failed" and (out / "RELION_JOB_EXIT_FAILURE").exists()
    start(table, out)
    assert state_of(out)["state"] == "done" and not (out / "RELION_JOB_EXIT_FAILURE").exists()
    assert [e["event"] for e in read_events(out)].count("started") == 1


def test_a_crash_is_recorded_with_its_traceback(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        start(table, out, trouble="crash")
    assert state_of(out)["state"] == "failed" and "ZeroDivisionError" in state_of(out)["message"]
    assert "Traceback" in (out / "log.txt").read_text()
    with pytest.raises(BadInput, match="unfinished"):
        start(table, out)


def test_a_missing_input_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing.star: no such file \(--table\)"):
        start(tmp_path / "nothing.star", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lower_layers_log_into_the_run(table: Path, tmp_path: Path) -> None:
    import logging

    with Run("counting", counting.Params(table=table), Options(output=tmp_path / "run", device="cpu", quiet=True)) as run:
        logging.getLogger("frazil.ops.dispatch").info("project runs on the cpu")
        run.warn("12 images are constant")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "project runs on the cpu" in text and "WARNING 12 images are constant" in text
    assert [e["message"] for e in read_events(tmp_path / "run") if e["event"] == "warning"] == ["12 images are constant"]
    assert not logging.getLogger("frazil").handlers


def test_checksum_of_a_huge_file_sees_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frazil.jobs.record.WHOLE_FILE", 3 * END)
    path = tmp_path / "stack.mrcs"
    path.write_bytes(bytes(4 * END))
    os.utime(path, ns=(1, 1))
    first = checksum(path)
    assert first.startswith("ends:")
    path.write_bytes(bytes(4 * END - 1) + b"x")
    os.utime(path, ns=(1, 1))
    assert checksum(path) != first


@pytest.mark.parametrize("text, value", [("6GB", 6 * 10**9), ("500 MB", 5 * 10**8), ("1.5g", 15 * 10**8), ("2GiB", 2**31), (None, None)])
def test_memory_sizes(text: str | None, value: int | None) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["lots", "-1GB", "6 XB", "0GB"])
def test_wrong_memory_sizes(text: str) -> None:
    with pytest.raises(BadInput, match="write it like 6GB"):
        parse_memory(text)


def test_devices_and_threads() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(BadInput, match="not a device"):
        resolve_device("gpu")
    with pytest.raises(BadInput, match="usable GPUs"):
        resolve_device("cuda:99")
    assert cpu_threads(3) == 3 and cpu_threads(0) >= 1


@pytest.mark.parametrize("seconds, text", [(8.2, "8.2 s"), (192, "3 min 12 s"), (59.96, "60.0 s"), (7500, "2 h 05 min")])
def test_spoken_time(seconds: float, text: str) -> None:
    assert spoken_time(seconds) == text
