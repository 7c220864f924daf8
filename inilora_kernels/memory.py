"""Memory for large tensors, and how much of it there is."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# numpy asks for huge pages from here on.
_HUGE = 1 << 22
# From here on a tensor may have pages of its own, most of them huge: in small pages 28 MiB of a search of a 2048² at
# rank 128 make it 6 % longer.
_OWN_PAGES = 1 << 21
# Of Linux on x86-64, and on most of the others.
_HUGE_PAGE = 1 << 21
# torch's own: the bits of a library's products may depend on it.
_ALIGNMENT = 64
# What is kept to be used again: blocks of a multiple of the first, and no more than so many times the largest.
_KEPT_SIZES, _MOST_KEPT = _HUGE, 2

Block = NDArray[np.uint8]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor, in memory that is quick to touch for the first time if it is large.

    That is 2 MiB a page fault, not 4 KiB: numpy asks Linux for huge pages. 32 MiB are read in 8 ms, not in 20.
    """
    count = math.prod(shape) * dtype.itemsize
    if count < _HUGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _reused.take(count + _ALIGNMENT)
    first = -block.ctypes.data % _ALIGNMENT
    # The tensor's storage holds this very array, and all of the tensor's views hold the storage.
    memory = block[first : first + count]
    weakref.finalize(memory, _reused.give_back, block).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def returned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialized tensor whose memory, if it is large, goes back to the system as soon as the tensor dies.

    glibc's heap keeps what it frees: once a process has freed a tensor of up to 32 MiB, smaller ones no longer have
    pages of their own. A run that takes and frees different sizes leaves holes that the next one does not fit, and its
    peak becomes half as high again.
    """
    count = math.prod(shape) * dtype.itemsize
    if count < _OWN_PAGES or torch.device(device).type != "cpu" or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -np.frombuffer(pages, np.uint8).ctypes.data % _HUGE_PAGE
    if whole := count // _HUGE_PAGE * _HUGE_PAGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE, first, whole)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=first).view(shape)


@contextlib.contextmanager
def reused(matrices: int) -> Iterator[None]:
    """While the block runs, memory of `empty` that is free again is handed out once more, for the next matrix, if any.

    New memory is filled with zeros first, a page fault at a time, and on a virtual machine it may be new to that, too:
    a copy of 32 MiB takes 5 to 28 ms then, in place of 3.
    """
    if matrices < 2:
        yield
        return
    _reused.begin()
    try:
        yield
    finally:
        _reused.end()


class _Reused:
    """Free blocks by their size, while there are runs that use them."""

    def __init__(self) -> None:
        self._lock, self._runs = threading.Lock(), 0
        self._free: dict[int, deque[Block]] = {}
        self._largest = 0

    def begin(self) -> None:
        with self._lock:
            self._runs += 1

    def end(self) -> None:
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                self._free, self._largest = {}, 0

    def take(self, count: int) -> Block:
        if self._runs == 0:
            return np.empty(count, np.uint8)
        size = math.ceil(count / _KEPT_SIZES) * _KEPT_SIZES
        self._largest = max(self._largest, size)
        try:
            return self._free.setdefault(size, deque()).pop()
        except IndexError:
            return np.empty(size, np.uint8)

    def give_back(self, block: Block) -> None:
        """Called wherever a tensor dies, also within the methods above, so without a lock."""
        size, free = len(block), self._free
        idle = sum(other * len(blocks) for other, blocks in list(free.items()))
        if size in free and idle + size <= _MOST_KEPT * self._largest:
            free[size].append(block)


_reused = _Reused()


def free_memory() -> float:
    """Bytes of memory that this process may still take, within its control group's limit; inf where nothing says so.

    >>> free_memory() > 0
    True
    """
    known = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        known.append(float(Path("/sys/fs/cgroup/memory.max").read_text().replace("max", "inf")))
    return min(known)
