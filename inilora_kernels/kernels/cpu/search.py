"""The whole search for the leading triplets of one small W in one compiled call, which holds no lock.

solvers/krylov.py has the same search step by step, for every other W, and for those that this one leaves to it. Between
the passes over a small W, calls would take longer than sums, and Python would let one matrix's in at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .copies import copy_rows
from .eigen import decomposed
from .expansion import expand
from .jit import ZERO, njit
from .judgement import ANY_BEYOND, expected_outside, next_size, promised, rounding, settled, stops_outside, too_coarse
from .missed import bound_outside
from .orthonormal import projection_space
from .simd import give_way
from .team import job

# How a search ended: settled or at its end; float32 is too coarse; something that this search does not do.
ENDED, COARSE, LEFT = 0, 1, 2


@njit(cache=True, nogil=True)
def search(
    W: Any, layout: Any, works: Any, start: Any, fresh: Any, ranks: Any, goal: Any, sizes: Any, limits: Any,
    factors: Any, aims: Any, bounds: Any, least: float,
) -> Any:  # fmt: skip
    """Grow a space from `start` (b, n) until it promises enough, then one outside of it from `fresh` (b', n).

    W, layout, works: as `expand` takes them, the work space for b and for b' columns. goal: as judgement.py has it.
    sizes: vectors to the first look, and the most. limits: `expand`'s. factors: `expected_factor` after 1, 2, … passes
    of the second space; least: `least_part` of its start. aims: the promise to reach, the passes that a second space is
    expected to take, the least of them before it is judged, the share of θ_r that says that it has found what the
    first one missed, and passes for a proof by few vectors, once there is one. bounds: shares of θ_r at which λ_max
    outside may suffice.

    Returns how it ended; the basis Q (m, n); θ, g, QMQᵀ and its reduced form, as `RitzPairs` has them; the bound on
    λ_max outside; the passes of the first space, and the vectors of the others.
    """
    # A thread that waited for the interpreter's lock may have been woken on this thread's processor.
    give_way()
    b, n = start.shape
    most, rank = min(sizes[1], n - b), ranks.max()
    rows, T = np.empty((most + b, n), dtype=np.float32), np.empty((most + b, most + b))
    space, other_space = projection_space(b, most + b, n), projection_space(len(fresh), most + b, n)
    block, begun, leaving = start.copy(), np.empty((b, b)), np.empty((b, b))
    nothing, no_stops = rows[:0], np.empty((0, 2))
    size = passes = spent = others = ahead = first_proven = ZERO
    missed, target, before, then = np.inf, sizes[0], 0, np.inf
    theta, g, reduced, converged = decomposed(np.eye(1), np.zeros((b, 1)))
    # What the next passes grow: the space itself, or that outside of it.
    inside = True
    other_rows, other_T, other_block, stops = nothing, T[:0, :0].copy(), fresh, no_stops
    c = len(fresh)
    other_begun, other_leaving = np.empty((c, c)), np.empty((c, c))
    while True:
        if inside:
            wanted = min(math.ceil((min(target, most) - size) / b), (n - size) // b - 1)
            if wanted > 0:
                taken, whole, _ = expand(
                    W, layout, works[0], rows, T, nothing, space, block, begun, leaving, size, wanted, limits, no_stops,
                    job(), size == 0,
                )  # fmt: skip
                size += taken * b
                passes += taken
                if not whole:
                    ended = LEFT
                    break
            last = np.zeros((b, size))
            copy_rows(leaving, last[:, size - b :])
            theta, g, reduced, converged = decomposed(T[:size, :size].copy(), last)
            if not converged or too_coarse(theta, ranks, goal):
                ended = COARSE if converged else LEFT
                break
            outside = missed if missed < np.inf else expected_outside(theta, rank, factors[aims[1] - 1])
            now = promised(theta, g, ranks, outside, goal, aims[0], ANY_BEYOND)
            if now > aims[0] and size + 2 * b <= n and size < most:
                target = next_size(size, now, before, then, aims[0])
                before, then = size, now
                continue
            if settled(theta, g, ranks, missed, goal)[0]:
                ended = ENDED
                break
            wanted = min(len(factors), (n - size) // c - 1)
            if wanted < 1:
                ended = LEFT
                break
            expected = expected_outside(theta, rank, factors[min(aims[1], wanted) - 1])
            stops = stops_outside(theta, g, ranks, goal, factors[:wanted], expected, aims, bounds)
            other_rows, other_T = np.empty((wanted * c, n), dtype=np.float32), np.empty((wanted * c, wanted * c))
            other_block, others, ahead, inside = fresh.copy(), ZERO, wanted, False
            first_proven = wanted
        else:
            while_growing = stops if others == 0 else no_stops
            taken, whole, _ = expand(
                W, layout, works[1], other_rows, other_T, rows[:size], other_space, other_block, other_begun,
                other_leaving, others * c, ahead, limits, while_growing, job(), others == 0,
            )  # fmt: skip
            others += taken
            if not whole:
                ended = LEFT
                break
            bound, largest = bound_outside(
                other_T[: others * c, : others * c].copy(), other_leaving, other_begun, others, least
            )
            missed = min(missed, bound + 2 * rounding(theta, goal))
            proven, by_few = settled(theta, g, ranks, missed, goal)
            first_proven = min(first_proven, others) if proven else len(stops)
            waits = not by_few and others < min(len(stops), first_proven + aims[4])
            if waits and (proven or largest < aims[3] * theta[rank - 1]):
                ahead = ZERO + 1
                continue
            spent += others * c
            if not proven and largest >= aims[3] * theta[rank - 1]:
                ended = LEFT
                break
            if proven or size + 2 * b > n or size >= most:
                ended = ENDED
                break
            target, before, then, inside = max(size + 1.0, sizes[0]), 0, np.inf, True
    return ended, rows[:size], (theta, g, np.ascontiguousarray(T[:size, :size]), reduced), missed, passes, spent
