"""On which processor a thread runs, so that threads that work at once do not wait for each other on one.

Linux wakes a thread where the thread that wakes it runs, unless it knows of an idle processor; and a virtual machine's
that have been halted for a while count as taken. Two threads then share one beside an idle one until the scheduler
balances them, 4 to 30 ms later, which is as long as a small model takes. Elsewhere nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Collection

_LINUX = sys.platform == "linux"
# The first holds the interpreter's lock, the second does not.
_getcpu: Callable[[], int] | None = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if _LINUX else None
_yield: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_yield", None) if _LINUX else None


def current() -> int:
    """The number of the processor that this thread runs on; -1 where that is not known."""
    return -1 if _getcpu is None else _getcpu()


def leave(taken: Collection[int]) -> None:
    """Move this thread to another of its processors if it runs on one of these; the scheduler may move it again."""
    if sys.platform != "linux" or current() not in taken:
        return
    # A sandbox may forbid it, and a container's processors may change meanwhile.
    with contextlib.suppress(OSError):
        every = os.sched_getaffinity(0)
        if others := every.difference(taken):
            os.sched_setaffinity(0, others)
            os.sched_setaffinity(0, every)


def give_way() -> None:
    """Let a thread run that waits for this one's processor, if there is one."""
    if _yield is not None:
        _yield()
