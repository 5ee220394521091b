"""Work in processes of their own, where threads would wait for each other: many small steps of torch hold Python's lock.

    with Processes(16, ("frazil.jobs.ctf_work",)) as processes:
        for task in tasks:
            processes.submit(finish, task, then=record)       # record(finish(task)) is called here, in this thread, in order
"""
from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from frazil.ops.dispatch import set_threads


class Processes:
    """`count` processes with one CPU thread each; not more than 2 · `count` pieces of work wait.

    They are forked from a server that has imported `modules` and holds neither threads nor a GPU: it starts at once and imports while the
    caller goes on. What is given to them and comes back is copied. Where this process ends without leaving the block, they end too.
    """

    def __init__(self, count: int, modules: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*modules, "frazil.cli", "torch"])  # the command's own module is imported again in each of them
        _start_server()
        self._pool = ProcessPoolExecutor(count, context, _begin)
        self._waiting: deque[tuple[Future[bytes], Callable[[Any], object]]] = deque()
        self._most = 2 * count

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for all that was given, also after an error: what is computed is not lost."""
        try:
            while self._waiting:
                self._next()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, work: Callable[[Any], Any], task: Any, then: Callable[[Any], object]) -> None:
        """Have work(task) done in a process, and `then` called with what comes back; errors come out here or on leaving."""
        try:
            future = self._pool.submit(_do, packed((work, task)))
        except BrokenProcessPool:
            raise _lost() from None
        self._waiting.append((future, then))
        while len(self._waiting) > self._most or self._waiting[0][0].done():
            self._next()
            if not self._waiting:
                break

    def _next(self) -> None:
        future, then = self._waiting.popleft()
        try:
            back = future.result()
        except BrokenProcessPool:
            raise _lost() from None
        then(pickle.loads(back))


def _start_server() -> None:
    """Start the server where there is none, so that it finds the modules where this process has found its own."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _lost() -> RuntimeError:
    return RuntimeError("a process that shared the work was ended from outside, perhaps by lack of memory: --resume with fewer --threads")


def _begin() -> None:
    """In a new process: one thread; signals are the first process's affair, which ends this one when it is done, or by ending."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    set_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _do(given: bytes) -> bytes:
    work, task = pickle.loads(given)
    return packed(work(task))


class _Pickler(pickle.Pickler):
    """Tensors travel as arrays: torch's own way needs shared memory, of which containers have little."""

    def reducer_override(self, obj: Any) -> Any:
        """How an object is taken apart."""
        return (torch.from_numpy, (obj.detach().cpu().contiguous().numpy(),)) if type(obj) is Tensor else NotImplemented


def packed(value: Any) -> bytes:
    """For pickle.loads in another process; tensors are copied."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()
