"""Threads that work at once and are woken on one processor: who begins moves to another."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from inilora_kernels.kernels import processors
from inilora_kernels.kernels.threads import helped

linux = pytest.mark.skipif(sys.platform != "linux", reason="no such calls elsewhere")
several = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")


@linux
def test_a_thread_knows_its_processor() -> None:
    every = os.sched_getaffinity(0)
    assert processors.current() in every
    one = min(every)
    os.sched_setaffinity(0, {one})
    try:
        assert processors.current() == one
    finally:
        os.sched_setaffinity(0, every)


@linux
@several
def test_a_thread_leaves_a_processor_that_is_taken_and_may_return() -> None:
    every = os.sched_getaffinity(0)
    here = processors.current()
    # By the affinity that it has meanwhile: the scheduler may move it again at any time.
    seen = []
    real = os.sched_setaffinity

    def recorded(thread: int, to: set[int]) -> None:
        real(thread, to)
        seen.append((set(to), processors.current()))

    os.sched_setaffinity = recorded
    try:
        processors.leave(every - {max(every - {here})})
    finally:
        os.sched_setaffinity = real
    assert [to for to, _ in seen] == [{max(every - {here})}, every]
    assert seen[0][1] == max(every - {here})
    assert os.sched_getaffinity(0) == every


@linux
def test_who_has_one_processor_stays() -> None:
    every = os.sched_getaffinity(0)
    here = processors.current()
    os.sched_setaffinity(0, {here})
    try:
        processors.leave({here})
        assert processors.current() == here
    finally:
        os.sched_setaffinity(0, every)


def test_none_is_left_where_none_is_taken() -> None:
    processors.leave(())
    processors.give_way()


@linux
def test_help_has_the_processors_that_it_had() -> None:
    """Threads are kept: one that stayed bound to a processor would be so for all later work."""
    found: list[set[int]] = []
    came = threading.Event()

    def help() -> None:
        found.append(os.sched_getaffinity(0))
        came.set()

    for _ in range(20):
        came.clear()
        with helped(help, 1):
            assert came.wait(timeout=60)
    assert found == [os.sched_getaffinity(0)] * 20
