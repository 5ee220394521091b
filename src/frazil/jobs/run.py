"""A run: a directory that records one job, its progress, its end, and lets it stop and resume.

    with Run("refine3d", params, options) as run:
        state = run.load_checkpoint()                 # None in a new run
        for ...:
            run.progress(done, total, "iteration 3: expectation")
            run.check_stop()                          # raises Stopped after Ctrl-C or SIGTERM
            run.event("iteration", iteration=3, resolution=9.1)
            run.save_checkpoint({...})
        run.summary("resolution 7.2 Å")

The directory holds job.json (what was asked), state.json (how it stands, with a heartbeat), events.jsonl (a line a
measurement), log.txt, RELION_JOB_EXIT_SUCCESS or _FAILURE, and the job's outputs. `kill -9` at any moment leaves a directory
that --resume continues from the last checkpoint. What --resume looks at besides (list.copy, outputs.json): jobs/resuming.py.
"""
from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType
from typing import Any, Literal

import psutil
import structlog
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from frazil.data import BadInput
from frazil.io.files import atomic_path
from frazil.jobs.record import check_same, input_record, job_record, now, plain, read_json, write_json
from frazil.jobs.resuming import COPY, ITEMWISE, OUTPUTS, keep_list, lost, outputs
from frazil.ops.dispatch import set_threads
from frazil.refine.parallel import join, leave, local_device, world_of_environment

HEARTBEAT = 2.0  # s between writes of state.json
STALE = 60.0  # s without a heartbeat after which a run on another machine counts as dead
EXIT_FILES = {True: "RELION_JOB_EXIT_SUCCESS", False: "RELION_JOB_EXIT_FAILURE"}
SHARED_WORK = ("class2d", "class3d")  # jobs whose particles several processes share (refine/parallel.py)
BOOKKEEPING = {"job.json", "state.json", "events.jsonl", "log.txt", COPY, OUTPUTS, EXIT_FILES[False]}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

Status = Literal["queued", "running", "done", "failed", "stopped"]


class Stopped(Exception):
    """The user asked the run to stop (Ctrl-C, SIGTERM). `signal` is the number of the signal."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__("stopped")
        self.signal = int(signal_number)


class Options(BaseModel):
    """The options that every job with a run directory has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    output: Path = Field(description="directory for the results: a new or empty one, or that of a run to --resume")
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:0, cuda:1, …")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = as many as this process may use")
    seed: int = Field(0, ge=0, description="seed of everything random")
    resume: bool = Field(False, description="continue the run in --output from where it stopped; starts one if there is none")
    quiet: bool = Field(False, description="print errors only")
    gpu_memory: str | None = Field(None, description="GPU memory to use at most, such as 6GB; 90 % of what is free if not given")


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as "6GB", "500 MB" or "4GiB"; None stays None."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise BadInput(f"--gpu-memory: {text!r} is not an amount of memory; write it like 6GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def resolve_device(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:i`; raises BadInput for a device that is not there."""
    if name == "auto":
        return torch.device(local_device("cuda:0") if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if not found:
        raise BadInput(f"--device: {name!r} is not a device; give auto, cpu, cuda or cuda:0, cuda:1, …")
    index, count = int(local_device(f"cuda:{found[1] or 0}")[5:]), torch.cuda.device_count()
    if index >= count:
        raise BadInput(f"--device: {name} was asked for but there are {count} usable GPUs; `frazil doctor` says why, --device cpu works")
    return torch.device(f"cuda:{index}")


def cpu_threads(wanted: int) -> int:
    """Number of CPU threads for a wish, 0 = all that this process may use."""
    return wanted or len(os.sched_getaffinity(0))


def is_alive(state: dict[str, Any]) -> bool:
    """Whether the process that wrote `state` (of state.json) still works on the run."""
    if state.get("state") != "running":
        return False
    if state.get("host") != socket.gethostname():
        return time.time() - state.get("heartbeat", 0.0) < STALE
    try:
        process = psutil.Process(state["pid"])
        # The same number may be given to a new process: its age tells the two apart.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - state["process_started"]) < 2
    except (psutil.Error, KeyError):
        return False


def claim(path: Path, record: dict[str, Any], resume: bool) -> Literal["new", "resumed", "finished"]:
    """Make the directory of a run, or see that the run in it may be continued; raises BadInput where it may not."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file, but --output names a directory; choose another --output")
    contents = {p.name for p in path.iterdir() if not p.name.endswith(".tmp")} if path.exists() else set()
    if not contents:
        return "new"
    old, state, job = read_json(path / "job.json"), read_json(path / "state.json") or {}, record["job"]
    if old is None:
        raise BadInput(f"{path}: is not empty and holds no frazil run; choose a new --output")
    if old["job"] != job:
        raise BadInput(f"{path}: holds a {old['job']} run, not a {job} run; choose another --output")
    if is_alive(state):
        raise BadInput(f"{path}: its {job} run is still running (process {state['pid']} on {state['host']}); stop that first")
    if state.get("state") == "failed" and contents <= BOOKKEEPING:
        return "new"  # it failed before it made anything, mostly for a mistake the user has now mended
    finished = state.get("state") == "done"
    if not resume:
        raise BadInput(f"{path}: holds {'a finished' if finished else 'an unfinished'} {job} run: use --resume or another --output")
    changed = check_same(path, old, record)
    return "finished" if finished and not changed and job not in ITEMWISE else "resumed"


def end_torn_line(path: Path) -> None:
    """Cut a last line without end, left by a kill in the middle of a write."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


class Run:
    """One run of a job and its directory; a context manager, see the module's docstring.

    path: the directory; device: torch.device; threads, seed: numbers; gpu_memory: bytes or None; resumed: an unfinished run is
    continued; finished: nothing is left to do; stop_requested: a signal came, stop soon (`check_stop` raises Stopped then); kept: the
    iteration that the checkpoint on disk is of, where the job says so.
    """

    def __init__(self, job: str, params: BaseModel, options: Options) -> None:
        self.job, self.params, self.options = job, params, options
        self.path = options.output
        self.device = resolve_device(options.device)
        self.threads = cpu_threads(options.threads)
        self.seed = options.seed
        self.gpu_memory = parse_memory(options.gpu_memory)
        self.resumed = self.finished = self.stop_requested = False
        self.kept: int | None = None
        self._signal = int(signal.SIGINT)
        self._lines: list[str] = []
        self._state: dict[str, Any] = {"state": "queued", "progress": 0.0, "message": ""}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._console = Console(stderr=True, quiet=options.quiet, highlight=False, markup=False)
        self._undo: list[Callable[[], object]] = []

    # ---- beginning and end

    def __enter__(self) -> Run:
        record = job_record(self.job, self.params, self.seed, str(self.device))
        status = claim(self.path, record, self.options.resume)
        self.resumed, self.finished = status == "resumed", status == "finished"
        if self.finished:
            return self
        self._prepare_directory(record)
        self._start = time.monotonic()
        self._open_logs()
        try:
            self._begin(record)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.finished:
            self._console.print(f"{self.path}: the {self.job} run is finished already, nothing to do", soft_wrap=True)
            if gone := lost(self.path, read_json(self.path / OUTPUTS)):
                said = "; ".join(gone[:5]) + ("; …" if len(gone) > 5 else "")
                self._console.print(f"warning: since then {len(gone)} of its files were lost: {said}; to make them again give another "
                                    "--output", soft_wrap=True)  # fmt: skip
            return
        try:
            self._end(error)
        except (OSError, BadInput) as failure:  # a full disk: the error that ended the job matters more than how it is recorded
            if error is None:
                raise BadInput(f"{self.path}: the end of the run could not be recorded ({failure})") from failure
        finally:
            self._close()
        if error is None and not self.options.quiet:
            print("\n".join([*self._lines, f"finished in {spoken_time(self.elapsed())}; results in {self.path}"]), flush=True)
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(self._signal) from None

    def _prepare_directory(self, record: dict[str, Any]) -> None:
        """Make the directory; in a new run write job.json and drop what an earlier failed attempt noted."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.path}: the directory cannot be made ({error.strerror}); choose another --output") from error
        stale = set(EXIT_FILES.values()) if self.resumed else BOOKKEEPING
        for name in stale:
            (self.path / name).unlink(missing_ok=True)
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        old = read_json(self.path / "job.json") if self.resumed else None
        if old is not None:
            grown = {name: now for name, now in record["inputs"].items() if name == ITEMWISE.get(self.job)}
            record = {**old, **{key: record[key] for key in ("parameters", "asked")}, "inputs": {**old["inputs"], **grown}}
        write_json(self.path / "job.json", record)
        keep_list(self.path, self.job, record["inputs"])

    def _open_logs(self) -> None:
        """Send the package's log to log.txt and open events.jsonl."""
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.handleError = lambda record: None  # never a traceback on the terminal because the disk is full
        log, others = logging.getLogger("frazil"), logging.getLogger("py.warnings")
        level = log.level
        log.setLevel(logging.INFO)
        self._undo += [handler.close, lambda: log.setLevel(level)]
        for logger in (log, others):
            logger.addHandler(handler)
            self._undo.append(lambda logger=logger: logger.removeHandler(handler))
        self._log = logging.getLogger("frazil.run")
        end_torn_line(self.path / "events.jsonl")
        file = open(self.path / "events.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by _close)
        self._undo.append(file.close)
        self._events = structlog.wrap_logger(
            structlog.WriteLogger(file),
            processors=[structlog.processors.TimeStamper(fmt="iso", key="time"), structlog.processors.JSONRenderer(ensure_ascii=False)],
            wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
            context_class=dict,
        )

    def _begin(self, record: dict[str, Any]) -> None:
        """Say that it runs: state.json with a heartbeat, signals, the bar."""
        process = psutil.Process()
        self._state |= {"state": "running", "started": now(), "host": socket.gethostname(), "pid": process.pid}
        self._state["process_started"] = process.create_time()
        self._write_state()
        self.event("resumed" if self.resumed else "started", job=self.job, version=record["version"], device=str(self.device))
        self._log.info("%s: %s", "resumed" if self.resumed else "started", " ".join(record["command"]))
        self._catch_signals()
        beat = threading.Thread(target=self._beat, name="frazil-heartbeat", daemon=True)
        beat.start()
        self._undo.append(lambda: (self._ended.set(), beat.join()))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=self.options.quiet or not self._console.is_terminal)
        self._task = self._bar.add_task(self.job, total=None)
        self._bar.start()
        self._undo.append(self._bar.stop)

    def _end(self, error: BaseException | None) -> None:
        """Record how it ended."""
        self._ended.set()
        if error is None:
            self._finish("done", self._lines[0] if self._lines else "finished")
            self._state["progress"] = 1.0
            if self.job not in ITEMWISE:  # those look at their files themselves
                write_json(self.path / OUTPUTS, outputs(self.path, BOOKKEEPING | set(EXIT_FILES.values())))
            for line in self._lines:
                self._log.info("%s", line)
        elif isinstance(error, (Stopped, KeyboardInterrupt)):
            self._finish("stopped", "stopped; --resume continues it")
        else:
            self._finish("failed", f"{type(error).__name__}: {error}")
            self._log.error("failed\n%s", "".join(traceback.format_exception(error)))
        self.event(self._state["state"], message=self._state["message"], seconds=round(self.elapsed(), 3))
        if not isinstance(error, (Stopped, KeyboardInterrupt)):
            (self.path / EXIT_FILES[error is None]).touch()
        self._write_state()

    def _finish(self, status: Status, message: str) -> None:
        with self._lock:
            self._state |= {"state": status, "message": message, "ended": now()}

    def _close(self) -> None:
        """Give back what was opened, newest first."""
        while self._undo:
            with suppress(OSError):  # a full disk refuses what is still buffered
                self._undo.pop()()

    # ---- signals and heartbeat

    def _catch_signals(self) -> None:
        """Let SIGINT and SIGTERM ask for a stop after the current batch; only a main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._on_signal)
            self._undo.append(lambda number=number, before=before: signal.signal(number, before))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self.stop_requested:
            raise KeyboardInterrupt  # asked twice: stop at once, the last checkpoint stands
        self.stop_requested = True
        if not self.options.quiet:
            # print() may not be called while the interrupted code is printing; a plain write may.
            os.write(2, b"\nstopping after the current batch (again: at once)\n")

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                self._write_state()
            except (OSError, BadInput):
                continue  # a full disk shows when the job itself writes

    def _write_state(self) -> None:
        with self._lock:
            self._state["heartbeat"] = time.time()
            write_json(self.path / "state.json", self._state)

    # ---- what a job calls

    def settle(self, params: BaseModel) -> None:
        """Note in job.json what the run uses where that is more than it was asked for: values that follow from its input, and the seed."""
        path = self.path / "job.json"
        old = read_json(path) or {}
        inputs = {**old["inputs"], **input_record(params, known=old["inputs"])}
        write_json(path, {**old, "parameters": params.model_dump(mode="json"), "seed": self.seed, "inputs": inputs})

    def elapsed(self) -> float:
        """Seconds since this process began or resumed the run."""
        return time.monotonic() - self._start

    def check_stop(self) -> None:
        """Raise Stopped if the user asked for a stop: call it after each batch, when all that matters is saved."""
        if self.stop_requested:
            raise Stopped(self._signal)

    def progress(self, done: float, total: float, message: str = "") -> None:
        """Show and record how far the run, or the part of it named by `message`, has come. Cheap: call it each batch."""
        if message != self._state["message"]:
            self._bar.reset(self._task, total=total, description=message or self.job)
        self._bar.update(self._task, completed=done, total=total)
        self._state["message"] = message
        self._state["progress"] = min(1.0, done / total) if total else 0.0

    def event(self, kind: str, **values: Any) -> None:
        """Append {"event": kind, …, "time": …} to events.jsonl: numbers, text, lists, tensors; NaN becomes null."""
        with self._lock:
            self._events.info(kind, **plain(values))

    def note(self, line: str) -> None:
        """A line for log.txt and the terminal."""
        self._log.info("%s", line)
        self._console.print(line, soft_wrap=True)

    def warn(self, line: str) -> None:
        """A warning for log.txt, events.jsonl, the report and the terminal."""
        self._log.warning("%s", line)
        self.event("warning", message=line)
        self._console.print(f"warning: {line}", soft_wrap=True)

    def summary(self, *lines: str) -> None:
        """Lines to print when the job is done: what a person wants to know."""
        self._lines += lines

    def file(self, name: str) -> Path:
        """The path of a file of this run; write it inside `atomic_path`."""
        return self.path / name

    def save_checkpoint(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        """Keep `state` (tensors, numbers, text, lists and dicts of them) so that a resumed run can go on from here."""
        with atomic_path(self.path / name) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own error hides that of the system: no space, quota, …
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, name: str = "checkpoint.pt") -> dict[str, Any] | None:
        """The state saved last, on the CPU; None where there is none. Raises BadInput for a file that is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, UnpicklingError) as error:
            if "can't allocate memory" in str(error):  # the machine is too small, the file may be well
                raise
            state = None
        if isinstance(state, dict):
            return state
        written = max(self.path.glob("run_it*_optimiser.star"), default=None) if "continue_" in type(self.params).model_fields else None
        other = f", or go on with --continue {written} and another --output" if written else ""
        raise BadInput(f"{path}: is damaged, the run cannot resume from it; delete the file to start from the beginning{other}")


def spoken_time(seconds: float) -> str:
    """A duration as one says it: 8.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def execute(job: str, work: Callable[[Any, Run], None], params: BaseModel, options: Options) -> Run:
    """Run `work(params, run)` in its run directory and return the run; a finished run is left as it is.

    Started several times by torchrun, the first process has the run directory; the others work along in a temporary one.
    """
    world = world_of_environment()
    if world.size > 1 and job not in SHARED_WORK:
        raise BadInput(f"{job} works in one process, torchrun started {world.size}; only {' and '.join(SHARED_WORK)} share their work")
    join(str(resolve_device(options.device)) if world.size > 1 else "cpu")
    with TemporaryDirectory(prefix="frazil-") as aside:
        if world.rank:
            options = options.model_copy(update={"output": Path(aside) / "run", "quiet": True, "resume": False})
        with Run(job, params, options) as run:
            if not world.tell(run.finished):
                set_threads(run.threads)
                work(params, run)
    leave()
    return run
