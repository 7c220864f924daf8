"""The whole search for the leading triplets of one small W in one compiled call, which holds no lock.

solvers/krylov_search.py has the same search step by step, for every other W, and for those that this one leaves to it.
Between the passes over a small W, calls would take longer than sums, and Python would let one matrix's in at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .copies import copy_rows
from .counting import counted, next_count
from .eigen import decomposed
from .expansion import expand
from .jit import ZERO, njit
from .judgement import ANY_BEYOND, expected_outside, next_size, promised, too_coarse
from .orthonormal import projection_space
from .simd import give_way
from .team import job

# How a search ended: proven, or full; float32 is too coarse; something that this search does not do.
ENDED, COARSE, LEFT = 0, 1, 2


@njit(cache=True, nogil=True)
def search(
    W: Any, layout: Any, work: Any, start: Any, ranks: Any, goal: Any, sizes: Any, limits: Any, least: float,
    wanted: float, factor: float,
) -> Any:  # fmt: skip
    """Grow a space from `start` (b, n) until its count proves all ranks.

    W, layout, work: as `expand` takes them. ranks, goal: as judgement.py has them. sizes: vectors to the first look,
    and the most. limits: `expand`'s. least: ε of the count. wanted: the promise to reach before the count is expected
    to prove anything. factor: as `expected_outside` takes it.

    Returns how it ended; the basis Q (m, n); θ, g, QMQᵀ, ρ and the reduced form, as `RitzPairs` has them; the Ritz
    vectors that prove it, 0 where it is not proven, and c'; and the passes.
    """
    # A thread that waited for the interpreter's lock may have been woken on this thread's processor.
    give_way()
    b, n = start.shape
    most = min(sizes[1], n - b)
    rows, T = np.empty((most + b, n), dtype=np.float32), np.empty((most + b, most + b))
    space, no_stops = projection_space(b, most + b, n), np.empty((0, 2))
    block, begun, leaving = start.copy(), np.empty((b, b)), np.empty((b, b))
    size = passes = kept = ZERO
    target, before, then, bound_then, outside = sizes[0], 0, np.inf, np.inf, np.inf
    theta, both, reduced, converged = decomposed(np.eye(1), np.zeros((2 * b, 1)), 0.0)
    g = rho = both
    while True:
        ahead = min(math.ceil((min(target, most) - size) / b), (n - size) // b - 1)
        if ahead > 0:
            taken, whole, _ = expand(
                W, layout, work, rows, T, rows[:0], space, block, begun, leaving, size, ahead, limits, no_stops,
                job(), size == 0,
            )  # fmt: skip
            size += taken * b
            passes += taken
            if not whole:
                ended = LEFT
                break
        ends = np.zeros((2 * b, size))
        copy_rows(leaving, ends[:b, size - b :])
        copy_rows(begun.T, ends[b:, :b])
        theta, both, reduced, converged = decomposed(T[:size, :size].copy(), ends, goal[3])
        if not converged or too_coarse(theta, ranks, goal):
            ended = COARSE if converged else LEFT
            break
        g, rho = both[:, :b].copy(), both[:, b:].copy()
        kept, outside, bound = counted(theta, g, rho, ranks, goal, least)
        if kept > 0 or size + 2 * b > n or size >= most:
            ended = ENDED
            break
        missed = expected_outside(theta, ranks.max(), factor)
        now = promised(theta, g, ranks, missed, goal, wanted, ANY_BEYOND)
        if now > wanted:
            target = next_size(size, now, before, then, wanted)
        else:
            target = next_count(size, b, bound, before, bound_then)
        if target == 0.0:
            ended = LEFT
            break
        before, then, bound_then = size, now, bound
    return ended, rows[:size], (theta, g, np.ascontiguousarray(T[:size, :size]), rho, reduced), kept, outside, passes
