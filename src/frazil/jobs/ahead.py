"""What a command can begin while torch is being imported: decoding the first movies of `frazil motion` on a core that would be idle.

Loading torch and the rest takes a core a second and a half; a movie of 24 frames of 2,048² is decoded in half a second. Nothing depends on
it: what could not be decoded, or not in time, `frazil motion` decodes when it gets there, and says what is wrong. No torch here.
"""
from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST, MOST_PIXELS = 2, 3e8  # movies, and pixels of one: what the default --memory holds many times
NAME = "_rlnMicrographMovieName"
TIFF = (".tif", ".tiff")
SWITCH = 5e-4  # s after which threads take turns meanwhile; Python's 5 ms would hold decoding up at every strip of a frame
_begun: dict[Path, Future[Any]] = {}


def begin(arguments: Sequence[str]) -> None:
    """Begin with what `frazil ARGUMENTS` will want, if that can be told: the first movies, TIFF, of a run that is new."""
    known = ("--memory", "--resume", "--help", "-h")
    if arguments[:1] != ["motion"] or any(a.split("=")[0] in known for a in arguments):
        return
    table = next((Path(a) for a in arguments[1:] if a.endswith(".star") and os.path.isfile(a)), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if table is None or cores < 2:
        return
    with suppress(OSError, ValueError):
        for name in movie_names(table, MOST):
            if name.suffix.lower() in TIFF and name.is_file():
                _begun[name.resolve()] = Future()
    if _begun:
        threading.Thread(target=_decode, args=(dict(_begun), min(4, cores - 1)), name="frazil-ahead", daemon=True).start()


def movie_names(table: Path, most: int) -> list[Path]:
    """The first movies of a STAR file, read without the modules that read whole ones; none where it is unusual."""
    column, fields, names = None, 0, []
    with open(table, encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if words[:1] == ["loop_"]:
                column, fields = None, 0
            elif words and words[0].startswith("_"):
                if words[0] == NAME:
                    column = fields
                fields += 1
            elif column is not None and len(words) == fields and not line.lstrip().startswith("#"):
                names.append(Path(words[column]))
                if len(names) == most:
                    break
    return names


def _decode(wanted: dict[Path, Future[Any]], threads: int) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        for path, future in wanted.items():
            if future.set_running_or_notify_cancel():
                future.set_result(_frames(path, threads))
    finally:
        sys.setswitchinterval(before)


def _frames(path: Path, threads: int) -> Any:
    """(n, rows, columns) as stored, or None: what is wrong is found, and said, later."""
    try:
        from frazil.io.tiff import tiff_frames

        shape, decode = tiff_frames(path, threads)
        return decode(0, shape[0]) if math.prod(shape) <= MOST_PIXELS else None
    except Exception:  # noqa: BLE001 (whatever it is, it comes again)
        return None


def decoding(path: Path, decode: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    """`decode` of a movie, which gives what was decoded ahead, once, where it is there or being made and all frames are asked for."""
    future = _begun.pop(path.resolve(), None)
    if future is None or future.cancel():
        return decode

    def first(start: int, stop: int) -> Any:
        nonlocal future
        ready = future.result() if future is not None else None
        future = None
        return ready if ready is not None and start == 0 and stop == len(ready) else decode(start, stop)

    return first
