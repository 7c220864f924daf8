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
from .poles import largest_about, numerators

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
    theta, both, _, converged = decomposed(T.copy(), rows, 0.0)
    if not converged:
        return np.inf, np.inf
    terms = numerators(both[:, b:].copy(), both[:, :b].copy())
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
        # About the middle of [low, high].
        radius = (high - low) / 2
        near = low - largest <= _NEAREST * largest
        if not near and largest_about(theta, terms, low + radius, radius, _REST * least, least) < least:
            high = low
        else:
            halvings += 1
    return high, largest
