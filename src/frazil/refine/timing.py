"""Seconds by phase of an iteration, for the log, the live page and bench/."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def added(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Seconds by name of two pieces of work together."""
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {*a, *b}}


class Clock:
    """Adds up seconds by name: `with clock("coarse"): ...`. On a GPU it waits for the device only when `exact`."""

    def __init__(self, device: str = "cpu", exact: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._sync = exact and device.startswith("cuda")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if self._sync:
                torch.cuda.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
