"""How many threads work on how many matrices: torch held to one, and several matrices side by side."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

# Handing work to another thread and back takes about 0.1 ms.
_FLOPS_WORTH_A_THREAD = 1e7
# Matrices in memory at once may take this many bytes, whatever their number.
_ROOM = 64 << 20

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
def _kept(count: int) -> ThreadPoolExecutor:
    """As many threads, for as long as the process lives: starting one takes as long as a small matrix's work."""
    return ThreadPoolExecutor(count, thread_name_prefix="inilora")


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.cache_clear)


@contextmanager
def helped(help: Callable[[], object], count: int) -> Iterator[None]:
    """Call `help` on up to this many other threads, with one of torch's own each, while the block runs.

    A call that has not begun at the end of the block never does; those that have are waited for. So the block must be
    able to do without them, and may be part of another block's help.
    """

    def call() -> None:
        torch.set_num_threads(1)
        help()

    calls = [_kept(count).submit(call) for _ in range(count)] if count > 0 else []
    try:
        yield
    finally:
        begun = [one for one in calls if not one.cancel()]
        wait(begun)
    for one in begun:
        one.result()


def beside(work: Callable[[], Result], threads: int) -> Callable[[], Result]:
    """Begin `work` on another thread, with one of torch's own, where there are several; the call waits for its result.

    What has not begun by then is done by that call itself, so it never waits for other work than this.
    """
    if threads <= 1:
        return functools.cache(work)

    def begin() -> Result:
        torch.set_num_threads(1)
        return work()

    begun = _kept(threads - 1).submit(begin)
    return functools.cache(lambda: work() if begun.cancel() else begun.result())


def both(left: Callable[[], Result], right: Callable[[], Other], threads: int, flops: float) -> tuple[Result, Other]:
    """The results of two calls: on a thread each, where there are two and each has so many FLOPs that it pays."""
    other = beside(right, worth(threads, flops))
    return left(), other()


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
    """`work` on each item, `count` of them at a time with a share of torch's threads each; in order.

    When the iterator is closed, no other item is begun.
    """
    count = min(count, len(items))
    if count <= 1:
        yield from map(work, items)
        return
    with one_torch_thread() as threads:
        share = max(1, threads // count)

        def call(item: Item) -> Result:
            torch.set_num_threads(share)
            return work(item)

        waiting = iter(items)
        # As many ahead as keep the threads busy: results that nobody has taken yet hold memory.
        calls = deque(_kept(count).submit(call, item) for item in islice(waiting, 4 * count))
        try:
            while calls:
                result = calls.popleft().result()
                calls.extend(_kept(count).submit(call, item) for item in islice(waiting, 1))
                yield result
        finally:
            for one in calls:
                one.cancel()
            wait(calls)


def in_groups(items: Iterable[Item], key: Callable[[Item], int]) -> list[tuple[int, list[Item]]]:
    """The items by their key, the largest key first, each group in order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return sorted(groups.items(), reverse=True)
