"""Writing files while the next iteration is computed: a thread that does one thing after another, and keeps the newest checkpoint only.

    with Writer() as writer:
        for state in …:
            writer.do(lambda state=state: write_iteration(state))          # every one of these is done, in order
            writer.newest("checkpoint", lambda state=state: save(state), 10)  # done when nothing else waits and ten times as long as
                                                                           # the last one took has passed; the next one replaces it
                                                                           # leaving waits for all that is left
A failure (a full disk) is raised by the next call, or on leaving.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Writer:
    """See the module's docstring. `most`: pieces of work that may wait before `do` waits too (they hold maps in memory)."""

    def __init__(self, most: int = 2) -> None:
        self._most, self._work, self._error = most, list[Callable[[], object]](), None
        self._newest: dict[str, tuple[Callable[[], object], float]] = {}  # by name: work, and how long it rests after the one before
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="frazil-writer", daemon=True)
        self._done: dict[str, tuple[float, float]] = {}  # by name: when the last one ended, and how many seconds it took

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for what is left, also after an error: the last checkpoint counts then. The first error of the two is raised."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if error is None:
            self._raise()

    def do(self, work: Callable[[], object]) -> None:
        """Have `work` done after all that waits already."""
        self._raise()
        with self._changed:
            self._changed.wait_for(lambda: len(self._work) < self._most or self._error is not None)
            self._raise()
            self._work.append(work)
            self._changed.notify_all()

    def newest(self, name: str, work: Callable[[], object], rest: float = 0.0) -> None:
        """Have `work` done when nothing else waits, unless more work of that name is given before. Does not wait.

        rest: how many times as long as the last of that name took should pass after it (on leaving, the last is done at once): that
        work takes 1 / (1 + rest) of the time at most.
        """
        self._raise()
        with self._changed:
            self._newest[name] = work, rest
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _due(self, name: str) -> float:
        """The time before which the newest work of a name need not be done; asked when the one before has ended."""
        ended, took = self._done.get(name, (-float("inf"), 0.0))
        return ended + self._newest[name][1] * took

    def _next(self) -> tuple[str, Callable[[], object]] | None:
        """What to do now (a name where it is a newest one); None: wait."""
        if self._work:
            return "", self._work.pop(0)
        ready = [name for name in self._newest if self._closed or self._due(name) <= time.monotonic()]
        return (ready[0], self._newest.pop(ready[0])[0]) if ready else None

    def _run(self) -> None:
        while True:
            with self._changed:
                while (item := self._next()) is None:
                    if self._closed:
                        return
                    first = min((self._due(name) for name in self._newest), default=None)
                    self._changed.wait(None if first is None else max(0.0, first - time.monotonic()))
                self._changed.notify_all()
            began = time.monotonic()
            try:
                item[1]()
            except BaseException as error:
                with self._changed:
                    self._error, self._work, self._newest = error, [], {}
                    self._changed.notify_all()
                return
            if item[0]:
                ended = time.monotonic()
                self._done[item[0]] = ended, ended - began
