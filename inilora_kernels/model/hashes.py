"""The sha256 of many tensors, several of them at a time in the lanes of a vector where that is faster."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.threads import share

# Importing numba takes as long as hashlib on so many bytes.
_WORTH_NUMBA = 1 << 28
# What a process may have open where the system does not say.
_FILES = 512


@dataclass(frozen=True)
class Hashed:
    """What is to be hashed: its bytes in order, in parts as `digests` takes them, and how many there are."""

    name: str
    size: int
    parts: Callable[[], Iterable[Tensor]] = field(compare=False)


def in_lanes(items: Sequence[Hashed], threads: int) -> int:
    """How many of these to hash at a time on each of the threads; 0 where one after another is as fast.

    >>> in_lanes([Hashed("one", 1 << 30, list)], threads=2)
    0
    """
    size = sum(item.size for item in items)
    if len(items) <= threads or ("numba" not in sys.modules and size < _WORTH_NUMBA):
        return 0
    from ..kernels.cpu import sha256

    each = math.ceil(len(items) / threads)
    # The same number in each round: the last one takes no less time for fewer.
    lanes = min(math.ceil(each / math.ceil(each / sha256.MOST)), _open_files() // threads)
    # A lane is slower than hashlib, and the largest has one for itself.
    busy = size // max(1, threads * max(item.size for item in items))
    return lanes if sha256.pays(min(lanes, busy), size // threads) else 0


def _open_files() -> int:
    """How many files to have open at once, each lane one: a quarter of what the process may."""
    try:
        import resource
    except ImportError:  # on Windows
        return _FILES // 4
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_FILES if soft == resource.RLIM_INFINITY else soft) // 4


def hash_in_lanes(items: Sequence[Hashed], lanes: int, threads: int, finished: Callable[[str, str], None]) -> None:
    """Hash them, `lanes` at a time on each thread. finished: called with each one's name and sha256 (hex)."""
    from ..kernels.cpu.sha256 import digests

    def work(todo: Iterator[Hashed]) -> None:
        with closing(digests(((item.name, item.parts()) for item in todo), lanes)) as hashes:
            for name, sha256 in hashes:
                finished(name, sha256)

    # The largest first, so that no lane is left with one at the end.
    share(work, sorted(items, key=lambda item: -item.size), threads)
