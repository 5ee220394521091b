"""What a person reads when a command ends badly: one line and an exit code."""
from __future__ import annotations

import errno
import os
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from frazil.jobs.run import BadInput, Stopped

USERS_MATTER = {
    errno.ENOSPC: "no space left on the disk; free some and run again",
    errno.EDQUOT: "disk quota used up; free some and run again",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
}


def explain(error: Exception, arguments: Sequence[str]) -> tuple[str, int]:
    """(line, exit code) for an error that ended the command given by `arguments`; the traceback goes to a file."""
    if isinstance(error, Stopped):
        again = [*arguments] if "--resume" in arguments else [*arguments, "--resume"]
        return f"stopped; continue with: frazil {shlex.join(again)}", 128 + error.signal
    if isinstance(error, BadInput):
        return "error: " + " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.errno in USERS_MATTER:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{USERS_MATTER[error.errno]}", 2
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"failed: {what[:300]} (the whole story is in {write_traceback(error, arguments)})", 1


def write_traceback(error: Exception, arguments: Sequence[str]) -> Path | str:
    """Where the traceback is: the run's log.txt, which has it already, or a new file in the temporary folder."""
    log = run_directory(arguments) / "log.txt"
    if log.is_file() and f"{type(error).__name__}" in log.read_text(errors="replace"):
        return log
    try:
        number, name = tempfile.mkstemp(prefix="frazil-", suffix=".log")
        with os.fdopen(number, "w") as file:
            file.write(f"frazil {shlex.join(arguments)}\n{''.join(traceback.format_exception(error))}")
    except OSError:
        return "no file: the temporary folder cannot be written"
    return Path(name)


def run_directory(arguments: Sequence[str]) -> Path:
    """The folder named by --output, the current one if there is none."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "--output":
            return Path(argument)
        if argument.startswith("--output="):
            return Path(argument.partition("=")[2])
    return Path()
