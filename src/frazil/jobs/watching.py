"""How a run looks on while a step works: progress, stopping, and what is finished in a checkpoint, for jobs of one long calculation."""
from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from frazil.data import Watch
from frazil.jobs.run import Run

INTERVAL = 2.0  # s between two checkpoints: what is lost at most, if a batch is shorter


def watched(run: Run, *read: Path) -> Watch:
    """A Watch that shows progress in the run, stops when asked to and keeps what is finished in its checkpoint.

    read: files that the job found by itself; the run compares only those that were named. Where they changed nothing is known.
    """
    files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in read]
    saved = (run.load_checkpoint() or {}) if run.resumed else {}
    known: dict[str, Tensor] = saved["kept"] if saved.get("files") == files else {}
    if saved and not known:
        run.note("input files have changed since the run was interrupted: it begins anew")
    elif known:
        run.note(f"finished before: {', '.join(known)}")
    kept, last = dict(known), 0.0

    def keep(name: str, value: Tensor) -> None:
        nonlocal last
        new = name not in kept
        if kept.get(name) is value:
            return
        kept[name] = value
        if new or time.monotonic() - last > INTERVAL:
            run.save_checkpoint({"files": files, "kept": kept})
            last = time.monotonic()

    def progress(what: str, done: float, total: float) -> None:
        run.check_stop()
        run.progress(done, total, what)

    return Watch(progress, known, keep)
