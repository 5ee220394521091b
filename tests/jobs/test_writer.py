"""Writing files while something else is computed."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from frazil.jobs.writer import Writer


def test_work_is_done_in_order_and_all_of_it():
    done = []
    with Writer() as writer:
        for i in range(20):
            writer.do(lambda i=i: done.append(i))
    assert done == list(range(20))


def test_only_the_newest_of_a_name_is_done():
    done, gate = [], threading.Event()
    with Writer(most=3) as writer:
        writer.do(lambda: gate.wait(10))  # what follows has to wait
        for i in range(50):
            writer.newest("checkpoint", lambda i=i: done.append(i))
        gate.set()
    assert done[-1] == 49 and len(done) <= 2


def until(condition: Callable[[], bool]) -> None:
    """Wait until the writer's thread has come so far."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def test_the_newest_rests_as_many_times_as_long_as_it_took_but_not_longer_than_the_writer_lives():
    done, begun = [], threading.Event()

    def keep(i: int) -> None:
        begun.set()
        time.sleep(0.05)
        done.append(i)

    with Writer() as writer:
        writer.newest("checkpoint", lambda: keep(0), rest=1e5)  # the first at once
        assert begun.wait(20)
        writer.newest("checkpoint", lambda: keep(1), rest=1e5)  # given while that is at work
        until(lambda: done == [0])
        for i in range(2, 5):
            writer.newest("checkpoint", lambda i=i: keep(i), rest=1e5)
            time.sleep(0.05)
        assert done == [0]  # none of the others for more than an hour
    assert done == [0, 4]


def test_what_takes_no_time_is_done_every_time():
    done = []
    with Writer() as writer:
        for i in range(5):
            writer.newest("checkpoint", lambda i=i: done.append(i), rest=10)
            until(lambda i=i: done == list(range(i + 1)))


def test_the_caller_waits_when_too_much_waits():
    gate, reached = threading.Event(), []
    with Writer(most=1) as writer:
        writer.do(lambda: gate.wait(10))

        def produce() -> None:
            for i in range(3):
                writer.do(lambda: None)
                reached.append(i)

        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(0.3)
        assert producer.is_alive() and len(reached) <= 2
        gate.set()
        producer.join(10)
    assert reached == [0, 1, 2]


def test_a_failure_is_raised_by_the_next_call_or_on_leaving():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Writer() as writer:
        writer.do(fail)
    with pytest.raises(OSError, match="No space"), Writer() as writer:
        for _ in range(1000):
            writer.do(fail)


def test_an_error_of_the_caller_still_lets_the_last_checkpoint_be_written():
    done = []
    with pytest.raises(KeyError), Writer() as writer:
        writer.newest("checkpoint", lambda: done.append("kept"))
        raise KeyError("stop")
    assert done == ["kept"]
