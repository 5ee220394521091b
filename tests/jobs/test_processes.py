"""Processes that share work: order, copies, errors, an end from outside."""
from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest
import torch

from frazil.data import BadInput
from frazil.jobs.processes import Processes, packed


def _work(task: tuple[int, torch.Tensor]) -> tuple[int, int, int, torch.Tensor]:
    """Later tasks are done sooner."""
    number, values = task
    time.sleep(0.02 * (3 - number % 4))
    return number, os.getpid(), torch.get_num_threads(), values * 2


def _refuse(task: int) -> int:
    raise BadInput(f"row {task}: no")


def _end(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_from_other_processes() -> None:
    found: list[tuple[int, int, int, torch.Tensor]] = []
    threads = set[int]()

    def then(back: tuple[int, int, int, torch.Tensor]) -> None:
        found.append(back)
        threads.add(threading.get_ident())

    with Processes(2) as processes:
        for i in range(8):
            processes.submit(_work, (i, torch.full((3,), float(i))), then)
    assert [f[0] for f in found] == list(range(8)) and threads == {threading.get_ident()}
    assert 1 <= len({f[1] for f in found}) <= 2 and os.getpid() not in {f[1] for f in found} and {f[2] for f in found} == {1}
    assert all(torch.equal(f[3], torch.full((3,), 2.0 * i)) for i, f in enumerate(found))


def test_errors_come_out_and_what_waits_is_not_lost() -> None:
    found: list[int] = []
    with pytest.raises(BadInput, match="row 7: no"), Processes(1) as processes:
        processes.submit(_work, (1, torch.zeros(1)), lambda back: found.append(back[0]))
        processes.submit(_refuse, 7, found.append)
    assert found == [1]


def test_a_process_ended_from_outside_is_said() -> None:
    with pytest.raises(RuntimeError, match="lack of memory"), Processes(1) as processes:
        processes.submit(_end, 0, print)


def test_tensors_travel_without_shared_memory() -> None:
    values = torch.arange(12.0).reshape(3, 4).T
    back = pickle.loads(packed({"a": values, "b": None}))
    assert torch.equal(back["a"], values) and back["a"].is_contiguous() and not back["a"].is_shared()
