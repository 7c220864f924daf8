"""Parts of a job that threads take one after the other, inside compiled calls, which hold no lock.

A job is done in rounds, such as the passes over a matrix. The thread that owns it opens a round of some parts, takes
parts like everybody, and goes on when all are done. Helpers take parts, too, and wait between the rounds; they may come
late or never.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import njit
from .simd import atomic_add, compare_and_swap, give_way, spin_pause

_SPINS_BEFORE_YIELD = 4000
# Places in the shared array, a cache line apart: how many parts were opened, taken and done, in all rounds so far; and
# what the owner says of the open round.
_OPENED, _TAKEN, _DONE, WHAT, _LENGTH = 0, 16, 32, 48, 56
_CLOSED = -(1 << 62)


@njit(cache=True, nogil=True)
def job() -> Any:
    """The shared array of a new job, with no round opened."""
    return np.zeros(_LENGTH, np.int64)


@njit(cache=True, nogil=True, inline="always")
def pause(spins: int) -> None:
    """Wait a moment, `spins` of them in a row: busily at first, then letting other threads run."""
    spin_pause()
    if spins > _SPINS_BEFORE_YIELD:
        give_way()


@njit(cache=True, nogil=True)
def open_round(job: Any, parts: int) -> None:
    """Open a round of this many parts."""
    atomic_add(job, _OPENED, parts)


@njit(cache=True, nogil=True)
def close(job: Any) -> None:
    """End the job: helpers return."""
    atomic_add(job, _OPENED, _CLOSED)


@njit(cache=True, nogil=True)
def take_part(job: Any) -> Any:
    """A part of an open round that nobody has taken, counted over all rounds; -1 if there is none."""
    while True:
        taken = atomic_add(job, _TAKEN, 0)
        if taken >= atomic_add(job, _OPENED, 0):
            return -1
        if compare_and_swap(job, _TAKEN, taken, taken + 1):
            return taken


@njit(cache=True, nogil=True)
def part_done(job: Any) -> None:
    """Say that a part that was taken is done."""
    atomic_add(job, _DONE, 1)


@njit(cache=True, nogil=True)
def wait_for_part(job: Any) -> Any:
    """`take_part` of a helper: waits for the next round; -1 when the job has ended."""
    spins = 0
    while True:
        part = take_part(job)
        if part >= 0 or atomic_add(job, _OPENED, 0) < 0:
            return part
        spins += 1
        pause(spins)


@njit(cache=True, nogil=True)
def wait_until_done(job: Any) -> None:
    """Wait until all parts that were taken are done."""
    spins = 0
    while atomic_add(job, _DONE, 0) < atomic_add(job, _TAKEN, 0):
        spins += 1
        pause(spins)
