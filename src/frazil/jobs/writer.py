"""Writing files while the next iteration is computed: a thread that does one thing after another, and keeps the newest checkpoint only.

    with Writer() as writer:
        for state in …:
            writer.do(lambda state=state: write_iteration(state))          # every one of these is done, in order
            writer.newest("checkpoint", lambda state=state: save(state))   # one that has not begun yet is replaced by the next
                                                                           # leaving waits for all that is left
A failure (a full disk) is raised by the next call, or on leaving.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Writer:
    """See the module's docstring. `most`: pieces of work that may wait before `do` waits too (they hold maps in memory)."""

    def __init__(self, most: int = 2) -> None:
        self._most, self._work, self._error = most, list[tuple[str, Callable[[], object]]](), None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="frazil-writer", daemon=True)

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
        self._put("", work)

    def newest(self, name: str, work: Callable[[], object]) -> None:
        """Have `work` done, unless more work of that name is given before it has begun."""
        self._put(name, work)

    def _put(self, name: str, work: Callable[[], object]) -> None:
        self._raise()
        with self._changed:
            if name:
                self._work = [item for item in self._work if item[0] != name]
            self._changed.wait_for(lambda: len(self._work) < self._most or self._error is not None)
            self._raise()
            self._work.append((name, work))
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._closed)
                if not self._work:
                    return
                _, work = self._work.pop(0)
                self._changed.notify_all()
            try:
                work()
            except BaseException as error:
                with self._changed:
                    self._error, self._work = error, []
                    self._changed.notify_all()
                return
