"""How long a run will take on this machine's processor, predicted from the speed of its matrix product and of its hash.

    Adam:    4·d·k·r FLOPs a step, at REACHED_ADAM of torch.mm's speed
    Krylov:  v = 6.5·r + 60 vectors: 4·d·k·v FLOPs for the products, at REACHED_KRYLOV of it, and 4·n·v² to keep them
             orthonormal, n = min(d, k), at REACHED_BASIS; and a fixed call time
    exact:   FULL_SVD·max(d, k)·min(d, k)² FLOPs
    all:     W's bytes once from the file, measured and hashed, before the first is solved

The shares were fitted to measurements on 2 Zen 4 cores, where torch.mm reaches 188 GFLOP/s; torch.mm is timed on the
machine at hand. Krylov's: to bench/results/solvers.md, Table 5 from file to file and the cells of ranks 8, 32 and 64,
the vectors as counted there. They are within a third of those, but for 1024×4096, which takes two to three times
as long as predicted. Rank 128 is not in the fit. sha256 is timed, too.
"""

from __future__ import annotations

import functools
import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Shape = tuple[int, int]

REACHED_ADAM = 0.75
REACHED_KRYLOV = 0.45
REACHED_BASIS = 0.2
VECTORS_A_RANK, VECTORS_MORE = 6.5, 60
CALLS_SECONDS = 0.004
FULL_SVD = 32
# Bytes a second that a thread takes from the page cache and measures; and hashes where it has no instructions for that
# but x86's vectors (sha256.py), on a Cascade Lake. hashlib is slower there than the last.
_READ, _HASHED_IN_LANES, _SLOWLY = 2.5e9, 2e9, 0.8e9
_X86 = ("x86_64", "AMD64")
# sha256 is timed on so many bytes.
_HASHED_BYTES = 1 << 18
# torch.mm is timed on matrices of this size for this long: enough to reach its speed, too short to be noticed.
_SIDE = 1024
_SECONDS = 0.05


@dataclass(frozen=True)
class Machine:
    """A processor.

    flops: of torch.mm, a second, by all threads. alone, together: bytes of weights that a thread reads, measures and
    hashes a second, one matrix after the other, and several at a time.
    """

    flops: float
    alone: float
    together: float
    threads: int

    def shared_by(self, processes: int) -> Machine:
        """What each of several processes has of it."""
        return replace(self, flops=self.flops / processes, threads=max(1, self.threads // processes))


# A typical one, for when the machine at hand is not worth timing.
USUAL = Machine(1e11, 0.75e9, 0.75e9, 2)


@functools.cache
def this_machine() -> Machine:
    """The processor at hand with torch's current threads, timed: a twentieth of a second."""
    alone, together = (1 / (1 / _READ + 1 / speed) for speed in _speeds_of_hashing())
    return Machine(_speed_of_torch_mm(), alone, together, torch.get_num_threads())


def _speeds_of_hashing() -> tuple[float, float]:
    """Bytes a second of sha256 on one thread, of one matrix and of several at a time."""
    content, best = bytes(_HASHED_BYTES), math.inf
    for _ in range(3):
        before = time.perf_counter()
        hashlib.sha256(content).digest()
        best = min(best, time.perf_counter() - before)
    alone = _HASHED_BYTES / best
    return alone, _HASHED_IN_LANES if alone < _SLOWLY and platform.machine() in _X86 else alone


def _speed_of_torch_mm() -> float:
    """FLOPs a second of a float32 matrix product on torch's current threads; the best of a few."""
    W = torch.ones(_SIDE, _SIDE, dtype=torch.float32)
    best, started = math.inf, time.perf_counter()
    torch.mm(W, W)
    while time.perf_counter() - started < _SECONDS or best == math.inf:
        before = time.perf_counter()
        torch.mm(W, W)
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best


def adam_seconds(shape: Shape, rank: int, steps: int, speed: float) -> float:
    """The steps alone.

    >>> round(64 * adam_seconds((4096, 4096), rank=8, steps=20_000, speed=188e9) / 60)  # measured: 78 minutes
    81
    """
    return steps * 4 * math.prod(shape) * rank / (REACHED_ADAM * speed)


def krylov_seconds(shape: Shape, rank: int, speed: float) -> float:
    """Subspace, certificate and loss of one matrix.

    >>> round(krylov_seconds((4096, 4096), rank=8, speed=188e9), 2)  # measured: 0.09 among 64, 0.08 alone
    0.1
    """
    n = min(shape)
    vectors = min(VECTORS_A_RANK * rank + VECTORS_MORE, n)
    products = 4 * math.prod(shape) * vectors / REACHED_KRYLOV
    return CALLS_SECONDS + (products + 4 * n * vectors**2 / REACHED_BASIS) / speed


def reading_seconds(sizes: Sequence[int], machine: Machine) -> float:
    """Of weights of so many bytes each. The largest is one thread's work.

    >>> reading_seconds([100] * 64, Machine(1e11, alone=1.0, together=2.0, threads=16))
    200.0
    """
    if not sizes:
        return 0.0
    among = machine.together if len(sizes) > 2 * machine.threads else machine.alone
    return max(sum(sizes) / (among * machine.threads), max(sizes) / among)


def full_svd_seconds(shape: Shape, rank: int, speed: float) -> float:
    """LAPACK's divide and conquer, with vectors; the same at every rank.

    >>> round(full_svd_seconds((4096, 4096), rank=8, speed=188e9), 1)  # measured: 11.7
    11.7
    """
    return FULL_SVD * max(shape) * min(shape) ** 2 / speed


# By the solver's name; all others need f*, which a Krylov space finds.
DIRECT_SECONDS: Mapping[str, Callable[[Shape, int, float], float]] = {"exact": full_svd_seconds}
