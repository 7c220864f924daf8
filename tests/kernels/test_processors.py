"""Threads that work at once and are woken on one processor: who begins moves to another."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from inilora_kernels.kernels import processors
from inilora_kernels.kernels.threads import helped

LINUX = sys.platform == "linux"
linux = pytest.mark.skipif(not LINUX, reason="no such calls elsewhere")
several = pytest.mark.skipif(not LINUX or len(os.sched_getaffinity(0)) < 2, reason="one processor")


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


@several
def test_a_thread_leaves_a_processor_that_is_taken_and_may_return(monkeypatch: pytest.MonkeyPatch) -> None:
    every = os.sched_getaffinity(0)
    free, where, bind = max(every), processors.current, os.sched_setaffinity
    seen: list[tuple[set[int], int]] = []

    def recorded(thread: int, to: set[int]) -> None:
        bind(thread, to)
        # At once: the scheduler may move a thread that is bound to several at any time.
        seen.append((set(to), where()))

    monkeypatch.setattr(os, "sched_setaffinity", recorded)
    monkeypatch.setattr(processors, "current", lambda: min(every))
    processors.leave(every - {free})
    assert [to for to, _ in seen] == [{free}, every]
    assert seen[0][1] == free
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


@several
def test_a_sandbox_that_forbids_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("sched_setaffinity")

    here = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(processors, "current", lambda: here)
    processors.leave({here})


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
