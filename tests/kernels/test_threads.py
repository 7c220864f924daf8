"""Matrices side by side: in order, with a share of the threads each, and none begun after the end."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection

import pytest
import torch

from inilora_kernels.kernels import threads
from inilora_kernels.kernels.threads import (
    beside,
    both,
    helped,
    in_groups,
    meanwhile,
    one_torch_thread,
    share,
    side_by_side,
)


def test_torch_has_its_threads_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_torch_thread():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
    with one_torch_thread() as threads:
        assert (threads, torch.get_num_threads()) == (before, 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("count", "share"), [(1, 6), (2, 3), (3, 2), (6, 1), (60, 1)])
def test_each_has_its_share_of_the_threads(count: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        found = list(side_by_side(lambda place: (place, torch.get_num_threads()), range(60), count))
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
    assert found == [(place, share) for place in range(60)]


def test_one_alone_has_all_threads() -> None:
    assert list(side_by_side(lambda _: torch.get_num_threads(), [0], 4)) == [torch.get_num_threads()]


def test_as_many_at_a_time_as_asked_for() -> None:
    meeting = threading.Barrier(3, timeout=60)
    assert list(side_by_side(lambda place: (meeting.wait(), place)[1], range(6), 3)) == list(range(6))


def test_nothing_is_begun_after_the_end() -> None:
    """An interrupted run of sixty large matrices ends with those in work."""
    begun: list[int] = []
    release, here = threading.Event(), threading.get_ident()

    def work(place: int) -> int:
        begun.append(place)
        if place > 0 and threading.get_ident() != here:
            release.wait(timeout=60)
        return place

    def stopped() -> None:
        with closing(side_by_side(work, range(60), 2)) as results:
            next(results)
            release.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(begun) < 60


def test_threads_do_not_run_far_ahead_of_who_takes_the_results() -> None:
    begun: list[int] = []
    reached = threading.Event()

    def work(place: int) -> None:
        begun.append(place)
        if len(begun) >= 9:
            reached.set()

    with closing(side_by_side(work, range(60), 2)) as results:
        next(results)
        # The other thread goes as far as it may.
        assert reached.wait(timeout=60)
    assert 1 < len(begun) <= 9


def test_this_thread_is_one_of_them() -> None:
    """Two at a time, and the other thread's first item waits for the second one to be done."""
    done: list[int] = []
    second = threading.Event()

    def work(place: int) -> int:
        if threading.get_ident() == here:
            done.append(place)
            second.set()
        else:
            assert second.wait(timeout=60)
        return place

    here = threading.get_ident()
    assert list(side_by_side(work, range(3), 2)) == [0, 1, 2]
    assert done


def test_an_error_comes_in_its_turn() -> None:
    def work(place: int) -> int:
        if place == 3:
            raise ValueError("the fourth")
        return place

    with closing(side_by_side(work, range(9), 2)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the fourth"):
            next(results)


def test_groups_keep_their_order() -> None:
    assert in_groups([3, 5, 1, 4, 2], lambda number: number % 2) == [(1, [3, 5, 1]), (0, [4, 2])]


@pytest.mark.parametrize("count", [1, 3])
def test_threads_share_the_items(count: int) -> None:
    done: list[tuple[int, int]] = []
    calls: list[int] = []
    meeting = threading.Barrier(count, timeout=60)

    def work(todo: Iterator[int]) -> None:
        calls.append(threading.get_ident())
        meeting.wait()
        done.extend((item, torch.get_num_threads()) for item in todo)

    before = torch.get_num_threads()
    share(work, range(20), count)
    assert sorted(item for item, _ in done) == list(range(20))
    assert threading.get_ident() in calls
    assert len(calls) == count
    assert count == 1 or {each for _, each in done} == {1}
    assert torch.get_num_threads() == before


def test_help_that_has_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kept threads are busy, with calls that wait for this very block."""
    two = ThreadPoolExecutor(2)
    monkeypatch.setattr(threads, "_kept", lambda: two)
    finished, busy = threading.Event(), threading.Barrier(3, timeout=60)

    def hold() -> None:
        busy.wait()
        finished.wait(timeout=60)

    calls: list[int] = []
    with helped(hold, 2):
        busy.wait()
        with helped(lambda: calls.append(1), 2):
            pass
        finished.set()
    assert calls == []


def in_a_child(connection: Connection) -> None:
    connection.send(list(side_by_side(lambda item: item + 1, range(4), 2)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    assert list(side_by_side(lambda item: item, range(4), 2)) == list(range(4))
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_a_child, args=(theirs,))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == [1, 2, 3, 4]
    child.join()


@pytest.mark.parametrize("in_this_thread", [True, False])
def test_when_one_raises_the_others_take_no_more(in_this_thread: bool) -> None:
    here, begun, taken = threading.get_ident(), threading.Event(), []

    def work(todo: Iterator[int]) -> None:
        for item in todo:
            taken.append(item)
            if (threading.get_ident() == here) == in_this_thread:
                begun.set()
                raise ValueError("it")
            begun.wait()

    with pytest.raises(ValueError, match="it"):
        share(work, range(10**6), 2)
    assert len(taken) < 10**6


def test_who_works_side_by_side_has_help_each() -> None:
    """Four threads, two matrices at a time: a pool as large as the one asked for would help one of them."""
    before = torch.get_num_threads()
    all_four = threading.Barrier(4, timeout=60)

    def work(place: int) -> int:
        with helped(all_four.wait, torch.get_num_threads() - 1):
            all_four.wait()
        return place

    torch.set_num_threads(4)
    try:
        assert list(side_by_side(work, range(2), 2)) == [0, 1]
    finally:
        torch.set_num_threads(before)


def test_what_has_not_begun_beside_is_done_by_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = ThreadPoolExecutor(1)
    monkeypatch.setattr(threads, "_kept", lambda: one)
    goes_on, calls = threading.Event(), []

    def work() -> int:
        calls.append(threading.get_ident())
        return 7

    with helped(lambda: goes_on.wait(60), 1):
        asked = beside(work, 2)
        assert (asked(), asked()) == (7, 7)
        goes_on.set()
    assert calls == [threading.get_ident()]
    assert beside(work, 1)() == 7


def test_a_thread_helps_when_it_is_done_with_what_it_does_meanwhile() -> None:
    begun, goes_on, ends = threading.Event(), threading.Event(), threading.Event()
    all_came = threading.Barrier(3, timeout=60)
    done_before: list[bool] = []

    def work() -> int:
        begun.set()
        goes_on.wait(60)
        ends.set()
        return 7

    def help() -> None:
        done_before.append(ends.is_set())
        goes_on.set()
        all_came.wait()

    found = meanwhile(work, 3)
    assert begun.wait(60)
    with helped(help, 2):
        all_came.wait()
    assert done_before == [False, True]
    assert found() == 7


def test_a_block_does_not_wait_for_what_is_done_meanwhile() -> None:
    goes_on, calls = threading.Event(), []
    found = meanwhile(lambda: goes_on.wait(60), 2)
    with helped(lambda: calls.append(1), 1):
        pass
    goes_on.set()
    assert found()
    assert calls == []


@pytest.mark.parametrize(("threads", "flops", "together"), [(2, 1e9, True), (2, 1e3, False), (1, 1e9, False)])
def test_both_are_on_a_thread_each_where_it_pays(threads: int, flops: float, together: bool) -> None:
    begun = threading.Event()

    def left() -> int:
        assert begun.wait(60 if together else 0) == together
        return threading.get_ident()

    def right() -> int:
        begun.set()
        return threading.get_ident()

    first, second = both(left, right, threads, flops)
    assert first == threading.get_ident()
    assert (first != second) == together
