"""Whether a weight that is read several times in a run stays the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# File systems count time in ticks of up to 2 s. A file that has just changed may change again unnoticed.
_TICK_NS = 2_000_000_000


def watch(files: Iterable[Path], sha256: Callable[[], str]) -> Callable[[str], bool]:
    """A check for later: whether the weight in these files still has the sha256 that was computed after this call.

    The files' times and sizes usually answer it. If they have changed, or were too recent to show a change, the weight
    is hashed again by `sha256`, which raises CheckpointError if the file is gone.
    """
    watched = sorted(set(files))
    before = _state(watched)

    def unchanged(expected: str) -> bool:
        return (before is not None and _state(watched) == before) or sha256() == expected

    return unchanged


def _state(files: list[Path]) -> list[tuple[int, int, int]] | None:
    """None where it proves nothing: a file is gone, not a regular file, or too recent."""
    try:
        found = [os.stat(file) for file in files]
    except OSError:
        return None
    now = time.time_ns()
    if any(abs(now - max(one.st_mtime_ns, one.st_ctime_ns)) < _TICK_NS for one in found):
        return None
    return [(one.st_mtime_ns, one.st_ctime_ns, one.st_size) for one in found]
