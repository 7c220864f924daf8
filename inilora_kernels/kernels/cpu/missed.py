"""The first step of certificate.py's bound, in compiled code: what λ_max(C) can be at most, judging by a Krylov space.

F(λ) = Σ_k ρ_k·g_kᵀ/(λ − θ_k) for the space's Ritz values θ (m, descending) and the rows of ρ (m×b) and g (m×b).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .copies import copy_rows
from .eigen import decomposed
from .jit import njit

# Intervals are so many halvings of their distance from the largest Ritz value long; of the first of those that will do,
# the next one is tried, too.
_COARSEST, _FINEST = 1, 5
# An interval begins no nearer to the largest Ritz value than this share of it.
_NEAREST = 2.0**-20
# What is left of the Taylor series may be this share of ε.
_REST = 0.01


@njit(cache=True, nogil=True)
def bound_outside(T: Any, leaving: Any, begun: Any, passes: int, least: float) -> Any:
    """c ≥ λ_max(C) from the space of T (m×m) = PᵀCP, and the largest Ritz value.

    leaving (b×b): CP = PT + N·leaving·(the last b rows of Pᵀ). begun (b×b): Ω = P_1·begun, of the first b columns of P.
    passes: the blocks of P. least: ε. Infinite where a row of `begun` is zero: then Ω was not independent of what C is
    orthogonal to, and not all of it stands in P; or where QL does not converge, which has not been seen.
    """
    m, b = len(T), len(leaving)
    for i in range(len(begun)):
        if begun[i, i] == 0.0:
            return np.inf, np.inf
    rows = np.zeros((b + len(begun), m))
    copy_rows(leaving, rows[:b, m - leaving.shape[1] :])
    copy_rows(begun.T, rows[b:, : len(begun)])
    theta, both, _, converged = decomposed(T, rows, 0.0)
    if not converged:
        return np.inf, np.inf
    g, rho = both[:, :b].copy(), both[:, b:].copy()
    largest = max(theta[0], 0.0)
    longest = 0.0
    for c in range(len(begun)):
        square = 0.0
        for i in range(len(begun)):
            square += begun[i, c] ** 2
        longest = max(longest, square)
    odds = math.sqrt(len(begun) * longest) / least
    high = (1.0 + math.sinh(math.asinh(odds) / (2 * passes - 1)) ** 2) * largest
    halvings = _COARSEST
    while halvings <= _FINEST:
        # Half as long as it is far from the largest value, a quarter, ….
        share = 0.5**halvings
        low = (high + share * largest) / (1.0 + share)
        if low - largest > _NEAREST * largest and _is_small(theta, rho, g, low, high - low, least):
            high = low
        else:
            halvings += 1
    return high, largest


@njit(cache=True, nogil=True)
def _is_small(theta: Any, rho: Any, g: Any, low: float, length: float, least: float) -> bool:
    """Whether |F| is below `least` on all of [low, low + length], low above θ. Reads ρ and g once for each term."""
    m, b = rho.shape
    weights, form = np.empty(m), np.empty((b, g.shape[1]))
    rest = 0.0
    for k in range(m):
        weights[k] = 1.0 / (low - theta[k])
        squares, others = 0.0, 0.0
        for c in range(b):
            squares += rho[k, c] ** 2
        for c in range(g.shape[1]):
            others += g[k, c] ** 2
        rest += weights[k] * math.sqrt(squares * others)
    ratio = length / (low - theta[0])
    total = 0.0
    while rest > _REST * least:
        form[:] = 0.0
        for k in range(m):
            for c in range(b):
                scaled = weights[k] * rho[k, c]
                for e in range(g.shape[1]):
                    form[c, e] += scaled * g[k, e]
            weights[k] *= length / (low - theta[k])
        squares = 0.0
        for c in range(b):
            for e in range(g.shape[1]):
                squares += form[c, e] ** 2
        total += math.sqrt(squares)
        if not total + _REST * least < least:
            return False
        rest *= ratio
    return total + rest < least
