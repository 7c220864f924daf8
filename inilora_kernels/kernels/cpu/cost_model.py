"""How long a run will take on this machine's processor, predicted from the speed of its matrix product.

    Adam:    4·d·k·r FLOPs a step, at REACHED_ADAM of torch.mm's speed
    Krylov:  4·d·k FLOPs a vector, VECTORS_PER_COLUMN·(r + 8) + 48 vectors, at REACHED_KRYLOV; and a fixed call time
    exact:   FULL_SVD·max(d, k)·min(d, k)² FLOPs
    all:     W's bytes once from the file, hashed

The shares were fitted to the measurements in docs/performance.md (2 Zen 4 cores), and are within about a third of them;
torch.mm is timed on the machine at hand.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping

import torch

Shape = tuple[int, int]

REACHED_ADAM = 0.75
REACHED_KRYLOV = 0.35
VECTORS_PER_COLUMN = 10
CERTIFICATE_VECTORS = 48
CALLS_SECONDS = 0.015
FULL_SVD = 32
# Bytes a second read from the page cache and hashed.
HASHED = 0.9e9
# torch.mm is timed on matrices of this size for this long: enough to reach its speed, too short to be noticed.
_SIDE = 1024
_SECONDS = 0.05


@functools.cache
def speed_of_torch_mm() -> float:
    """FLOPs a second of a float32 matrix product on torch's current threads; the best of a few."""
    W = torch.ones(_SIDE, _SIDE)
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

    >>> round(krylov_seconds((4096, 4096), rank=8, speed=188e9), 2)  # measured: 0.25 with the hash
    0.23
    """
    vectors = VECTORS_PER_COLUMN * (rank + 8) + CERTIFICATE_VECTORS
    return CALLS_SECONDS + 4 * math.prod(shape) * min(vectors, min(shape)) / (REACHED_KRYLOV * speed)


def full_svd_seconds(shape: Shape, rank: int, speed: float) -> float:
    """LAPACK's divide and conquer, with vectors; the same at every rank.

    >>> round(full_svd_seconds((4096, 4096), rank=8, speed=188e9), 1)  # measured: 11.7
    11.7
    """
    return FULL_SVD * max(shape) * min(shape) ** 2 / speed


# By the solver's name; all others need f*, which a Krylov space finds.
DIRECT_SECONDS: Mapping[str, Callable[[Shape, int, float], float]] = {"exact": full_svd_seconds}


def reading_seconds(weight_bytes: int) -> float:
    return weight_bytes / HASHED
