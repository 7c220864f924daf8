"""How many threads work on how many matrices: torch held to one, and several matrices side by side."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from . import processors

# Handing work to another thread and back takes about 0.1 ms.
_FLOPS_WORTH_A_THREAD = 1e7
# Matrices in memory at once may take this many bytes, whatever their number.
_ROOM = 64 << 20
# Items begun before the results of so many each have been taken.
_AHEAD = 4
# Each of several matrices side by side asks for up to a thread less than its share, and one for its hash.
_MOST_KEPT = 4 * (os.cpu_count() or 1)

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Hold torch to one thread for a while. Yields the number that it otherwise has, and has again afterwards.

    The number is the process's, for threads that have not asked for it yet.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def at_once(elements: int, itemsize: int, threads: int) -> int:
    """How many matrices of this size to work on at once, so that no thread waits.

    Two halves of the threads on a matrix each leave less unused than all on one. But memory stays near that of one
    large matrix in float32: two of 16 bits, or one.

    >>> [at_once(side * side, itemsize, threads=8) for side, itemsize in ((384, 4), (2048, 4), (4096, 4), (4096, 2))]
    [8, 4, 1, 2]
    """
    return min(threads, max(2 if itemsize <= 2 else 1, _ROOM // max(1, elements * itemsize)))


@functools.cache
def _kept() -> ThreadPoolExecutor:
    """Threads that are kept for as long as the process lives: starting one takes as long as a small matrix's work.

    One is started where none is idle, so that who works side by side can have help each.
    """
    return ThreadPoolExecutor(_MOST_KEPT, thread_name_prefix="inilora")


# What `meanwhile` has begun, until it is done.
_meanwhile: set[Future[Any]] = set()

# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.cache_clear)
    os.register_at_fork(after_in_child=_meanwhile.clear)


def _begun(work: Callable[[], Result]) -> Future[Result]:
    """`work` on another thread, with one of torch's own, and on another processor."""
    here = processors.current()

    def begin() -> Result:
        processors.leave({here})
        torch.set_num_threads(1)
        return work()

    return _kept().submit(begin)


@contextmanager
def helped(help: Callable[[], object], count: int) -> Iterator[None]:
    """Call `help` on up to this many other threads, with one of torch's own each, while the block runs.

    A call that has not begun at the end of the block never does; those that have are waited for. So the block must be
    able to do without them, and may be part of another block's help. For each thread that has something else to do
    `meanwhile`, one call begins only when that is done, or never, if the block ends first.
    """
    ended: Future[None] = Future()

    def after(other: Future[Any]) -> None:
        wait((other, ended), return_when=FIRST_COMPLETED)
        if not ended.done():
            help()

    occupied = [other for other in tuple(_meanwhile) if not other.done()][: max(0, count)]
    calls: list[Future[object]] = []
    try:
        for _ in range(count - len(occupied)):
            calls.append(_begun(help))
        for other in occupied:
            calls.append(_begun(partial(after, other)))
        if calls:
            processors.give_way()
        yield
    finally:
        ended.set_result(None)
        begun = [one for one in calls if not one.cancel()]
        wait(begun)
    for one in begun:
        one.result()


def beside(work: Callable[[], Result], threads: int) -> Callable[[], Result]:
    """Begin `work` on another thread, with one of torch's own, where there are several; the call waits for its result.

    What has not begun by then is done by that call itself, so it never waits for other work than this.
    """
    return _beside(work, threads, set())


def meanwhile(work: Callable[[], Result], threads: int) -> Callable[[], Result]:
    """`beside`, for work that takes long: until it is done, each `helped` block begins one of its calls later."""
    return _beside(work, threads, _meanwhile)


def _beside(work: Callable[[], Result], threads: int, until_done: set[Future[Any]]) -> Callable[[], Result]:
    if threads <= 1:
        return functools.cache(work)
    begun = _begun(work)
    until_done.add(begun)
    begun.add_done_callback(until_done.discard)
    processors.give_way()
    return functools.cache(lambda: work() if begun.cancel() else begun.result())


def both(left: Callable[[], Result], right: Callable[[], Other], threads: int, flops: float) -> tuple[Result, Other]:
    """The results of two calls: on a thread each, where there are two and each has so many FLOPs that it pays."""
    other = beside(right, worth(threads, flops))
    return left(), other()


def each_of(work: Callable[[Item], Result], items: Sequence[Item], flops: float) -> list[Result]:
    """`work` of about so many FLOPs on each item, side by side; on one of torch's threads each.

    Short work is left to few threads: each takes the interpreter's lock from the others for longer than it helps.
    """
    with one_torch_thread() as threads:
        enough = 1 + int(len(items) * flops / (2 * _FLOPS_WORTH_A_THREAD))
        return list(side_by_side(work, items, min(threads, enough)))


def worth(threads: int, flops: float) -> int:
    """All of the threads for so many FLOPs that sharing them pays, otherwise one.

    >>> worth(2, 1e9), worth(2, 1e6)
    (2, 1)
    """
    return threads if flops > _FLOPS_WORTH_A_THREAD else 1


def share(work: Callable[[Iterator[Item]], object], items: Iterable[Item], count: int) -> None:
    """Call `work` on this many threads, this one among them, each with one of torch's own; they share the items.

    Each call takes the next item whenever it is done with one. When one raises, the others take no more.
    """
    todo = iter(items)

    def call() -> None:
        try:
            work(todo)
        except BaseException:
            for _ in todo:
                pass
            raise

    if count <= 1:
        call()
        return
    with one_torch_thread(), helped(call, count - 1):
        call()


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], count: int) -> Generator[Result, None, None]:
    """`work` on each item, `count` of them at a time, with a share of torch's threads each; the results in order.

    This thread is one of them: whenever the next result is not there yet, it does an item. When the iterator is closed,
    no other item is begun.
    """
    count = min(count, len(items))
    if count <= 1:
        yield from map(work, items)
        return
    found: list[Future[Result]] = [Future() for _ in items]
    # How many were begun, and how many may be: results that nobody has taken yet hold memory.
    changed, begun, allowed = threading.Condition(), 0, _AHEAD * count
    # The processor that each thread began its item on.
    taken: dict[int, int] = {}

    def take(waits: bool) -> int | None:
        """The next item's place; None when there is none, or none yet for who does not wait."""
        nonlocal begun
        with changed:
            while waits and allowed <= begun < len(items):
                changed.wait()
            if begun >= min(allowed, len(items)):
                return None
            begun += 1
            return begun - 1

    def do(place: int) -> None:
        own = threading.get_ident()
        processors.leave({processor for thread, processor in taken.items() if thread != own})
        taken[own] = processors.current()
        try:
            found[place].set_result(work(items[place]))
        except BaseException as error:
            # For who takes the results, in order.
            found[place].set_exception(error)
            if not isinstance(error, Exception):
                raise

    def help() -> None:
        torch.set_num_threads(each)
        while (place := take(waits=True)) is not None:
            do(place)

    with one_torch_thread() as threads:
        each = max(1, threads // count)
        torch.set_num_threads(each)
        with helped(help, count - 1):
            try:
                for place in range(len(items)):
                    while not found[place].done() and (mine := take(waits=False)) is not None:
                        do(mine)
                    result = found[place].result()
                    found[place] = Future()
                    with changed:
                        allowed += 1
                        changed.notify_all()
                    yield result
            finally:
                with changed:
                    begun = allowed = len(items)
                    changed.notify_all()


def in_groups(items: Iterable[Item], key: Callable[[Item], int]) -> list[tuple[int, list[Item]]]:
    """The items by their key, the largest key first, each group in order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return sorted(groups.items(), reverse=True)
