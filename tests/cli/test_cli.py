"""The command line: help, options from parameters, one clear line for every mistake, exit codes."""
from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.jobs import counting

import frazil.jobs
from frazil.cli import main
from frazil.cli.errors import explain
from frazil.jobs.run import BadInput, Run, Stopped


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An input file, in a world where `counting` is a command."""
    monkeypatch.setitem(frazil.jobs.JOBS, "counting", "add up numbers")
    monkeypatch.setitem(sys.modules, "frazil.jobs.counting", counting)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "table.star"
    path.write_text("data_\n")
    return path


def lines(captured: str) -> list[str]:
    return [line for line in captured.splitlines() if line.strip()]


def test_help_lists_every_command_on_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for job, text in frazil.jobs.JOBS.items():
        assert any(job in line and text in line for line in shown.splitlines()), f"{job} wraps or is missing"


def test_help_of_a_command_has_units_groups_and_defaults(table, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["counting", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "how many numbers [numbers] [default: 5]" in shown
    assert shown.index("Parameters") < shown.index("Expert parameters") < shown.index("Run")
    for option in ("--output", "--device", "--threads", "--seed", "--resume", "--quiet", "--gpu-memory"):
        assert option in shown
    assert "TABLE" in shown


def test_a_job_runs_and_says_what_came_out(table, capsys) -> None:
    assert main(["counting", "table.star", "--output", "run", "--items", "3", "--device", "cpu", "--threads", "1"]) == 0
    out = lines(capsys.readouterr().out)
    assert out[0].startswith("sum ") and out[-1].startswith("finished in ") and out[-1].endswith("results in run")
    assert (table.parent / "run" / "RELION_JOB_EXIT_SUCCESS").exists()


def test_quiet_prints_nothing(table, capsys) -> None:
    assert main(["counting", "table.star", "--output", "run", "--quiet", "--device", "cpu", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize("arguments, told", [
    (["counting"], "table"),
    (["counting", "table.star"], "--output"),
    (["counting", "table.star", "--output", "run", "--items", "many"], 'unable to convert "many" into int'),
    (["counting", "table.star", "--output", "run", "--items", "-3"], "--items: should be greater than 0 (got -3)"),
    (["counting", "table.star", "--output", "run", "--threads", "-1"], "--threads: should be greater than or equal to 0"),
    (["counting", "nothing.star", "--output", "run"], "nothing.star: no such file (--table)"),
    (["counting", "table.star", "--output", "run", "--device", "tpu"], "--device: 'tpu' is not a device"),
    (["counting", "table.star", "--output", "run", "--gpu-memory", "big"], "write it like 6GB"),
    (["counting", "table.star", "--output", "run", "--item", "3"], "--item"),
    (["counting", "table.star", "extra", "--output", "run"], "extra"),
    (["counting", "table.star", "--output", "run", "--trouble", "bad input"], "table.star: row 3 has no image"),
    (["refine4d"], 'unknown command "refine4d". Did you mean refine3d?'),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(table, capsys, arguments, told) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(lines(captured.err)) == 1
    assert told in captured.err and "Traceback" not in captured.err


def test_a_second_run_in_the_same_directory_is_refused(table, capsys) -> None:
    command = ["counting", "table.star", "--output", "run", "--device", "cpu", "--threads", "1"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "run: holds a finished counting run: use --resume or another --output" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0


def test_a_defect_is_one_line_that_names_the_log_and_exit_1(table, capsys) -> None:
    assert main(["counting", "table.star", "--output", "run", "--trouble", "crash", "--device", "cpu", "--threads", "1"]) == 1
    shown = capsys.readouterr().err
    assert len(lines(shown)) == 1 and "ZeroDivisionError: a defect" in shown and "run/log.txt" in shown
    assert "Traceback" in (table.parent / "run" / "log.txt").read_text()


def test_a_stop_says_how_to_resume(table, capsys, monkeypatch) -> None:
    note = Run.event

    def event(self: Run, kind: str, **values) -> None:
        note(self, kind, **values)
        if values.get("item") == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "event", event)
    command = ["counting", "table.star", "--output", "run", "--device", "cpu", "--threads", "1"]
    assert main(command) == 130
    assert f"continue with: frazil {' '.join(command)} --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0


def test_exit_codes_of_errors() -> None:
    assert explain(Stopped(signal.SIGTERM), ["fsc"]) == ("stopped; continue with: frazil fsc --resume", 143)
    assert explain(BadInput("a.mrc:\n  odd box"), []) == ("error: a.mrc: odd box", 2)
    line, code = explain(OSError(errno.ENOSPC, "No space left on device", "out.mrc"), [])
    assert code == 2 and line == "error: out.mrc: no space left on the disk; free some and run again"


def test_a_defect_without_a_run_directory_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line, code = explain(ValueError("odd"), ["fsc", "a.mrc"])
    log = next(tmp_path.glob("frazil-*.log"))
    assert code == 1 and str(log) in line and "ValueError: odd" in log.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line_and_exit_2(table, capsys, monkeypatch) -> None:
    def run(params: counting.Params, run: Run) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100)

    monkeypatch.setattr(counting, "run", run)
    assert main(["counting", "table.star", "--output", "run", "--device", "cpu", "--threads", "1"]) == 2
    assert "no space left" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "frazil", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == frazil.__version__


def test_a_program_ends_at_once_but_not_before_its_output_and_others_clean_up(tmp_path: Path) -> None:
    """entry() leaves the modules to the system: text in a pipe, atexit and threads that still work must be seen to all the same."""
    program = """
import atexit, sys, threading, time
import frazil.cli as cli
atexit.register(lambda: open("cleaned", "w").close())
def work(arguments=None):
    print("x" * 100_000)
    if THREAD:
        threading.Thread(target=lambda: (time.sleep(0.3), open("worked", "w").close())).start()
    return 7
cli.main = work
cli.entry()
"""
    for thread in (False, True):
        command = [sys.executable, "-c", program.replace("THREAD", str(thread))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 7 and done.stdout == "x" * 100_000 + "\n" and done.stderr == ""
        assert (tmp_path / "cleaned").exists() and (tmp_path / "worked").exists() == thread
        (tmp_path / "cleaned").unlink()


def test_cycles_are_collected_while_a_job_works(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "run", lambda params, run: seen.append(gc.isenabled()), raising=True)
    seen: list[bool] = []
    gc.disable()  # as entry() does
    try:
        assert main(["counting", "table.star", "--output", "run", "--device", "cpu", "--threads", "1", "--quiet"]) == 0
        assert seen == [True] and gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
