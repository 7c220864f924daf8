"""How many eigenvalues of M lie above some μ, judging by one Krylov space: certificate.py's count, in compiled code.

θ (m, descending), g (m×b') and ρ (m×b) make F(λ) = Σ_k ρ_k·g_kᵀ/(λ − θ_k); float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .jit import ZERO, njit
from .judgement import FEW_BEYOND, promised_beyond, rounding
from .poles import largest_about, numerators, square

# What is left of a Taylor series may be this share of ε.
_REST = 0.02
# Where a bound on |F| is so many times ε, more vectors are not yet worth estimating.
_FAR = 1e4
# An interval is no shorter than this share of its middle.
_NEAREST = 2.0**-40
# Where nothing is known yet, so large a share of the vectors more.
_MORE = 0.12
# As many vectors as a second space takes.
_SECOND_SPACE = 60
# Numbers of Ritz vectors for which the bound is worth its time.
_MOST_TRIED = 2
# How far μ is from θ_{p+1}, as a share of the gap to θ_p; |F| is the smaller, the farther.
_PLACES = (0.9, 0.75, 0.5)


@njit(cache=True, nogil=True)
def counted(theta: Any, g: Any, rho: Any, ranks: Any, goal: Any, least: float) -> Any:
    """Whether the count proves all ranks. Returns p, c' and the least bound on |F| found, as a multiple of ε.

    ranks, goal: as judgement.py has them. least: ε. p is 0, and c' infinite, where it does not prove them; the bound is
    infinite where it is not even promised, or far above ε.
    """
    best, off, tried = np.inf, rounding(theta, goal), 0
    for beyond in range(FEW_BEYOND + 1):
        count = ranks.max() + beyond
        if count >= len(theta) or tried == _MOST_TRIED:
            break
        mu, outside = _promising(theta, g, ranks, count, goal)
        if outside < np.inf:
            found = level(theta, g, rho, count, mu, goal[0] + off, least)
            if found <= least:
                return count, outside, found / least
            best = min(best, found / least)
            tried += 1
    return ZERO, np.inf, best


@njit(cache=True, nogil=True)
def separable(theta: Any, ranks: Any, goal: Any) -> bool:
    """Whether the count could prove all ranks if these θ were exact: whether rounding leaves a gap behind them."""
    exact = np.zeros((len(theta), 1))
    for beyond in range(FEW_BEYOND + 1):
        count = ranks.max() + beyond
        if count < len(theta) and _promising(theta, exact, ranks, count, goal)[1] < np.inf:
            return True
    return False


@njit(cache=True, nogil=True)
def _promising(theta: Any, g: Any, ranks: Any, count: int, goal: Any) -> Any:
    """The first μ behind `count` values at which they promise to prove all ranks, and c'; infinite where none does."""
    off = rounding(theta, goal)
    for place in _PLACES:
        mu = theta[count] + place * (theta[count - 1] - theta[count])
        outside = _outside(theta, g, count, mu) + 2.0 * off
        if promised_beyond(theta, g, ranks, count, outside, goal):
            return mu, outside
    return np.inf, np.inf


@njit(cache=True, nogil=True)
def _outside(theta: Any, g: Any, count: int, mu: float) -> float:
    """c' ≥ λ_max(C'), if no more than `count` eigenvalues of M are above μ."""
    total = mu
    for k in range(count):
        if not theta[k] > mu:
            return np.inf
        total += square(g[k]) / (theta[k] - mu)
    return total


@njit(cache=True, nogil=True)
def level(theta: Any, g: Any, rho: Any, count: int, mu: float, highest: float, least: float) -> Any:
    """A bound on |F_{-k}(λ)|, for every λ in (μ, highest] and the cell k that it is in; infinite where far above ε.

    count: θ_count > μ > θ_{count+1}. least: ε.
    """
    weights = np.empty(count)
    # What a cell has below its θ, and above it.
    below, above = np.empty(count), np.empty(count)
    for k in range(count):
        weights[k] = math.sqrt(square(rho[k]) * square(g[k]))
    for k in range(count - 1):
        gap, both = theta[k] - theta[k + 1], weights[k] + weights[k + 1]
        if both >= _FAR * least * gap:
            return np.inf
        # The cells part where both poles are as large.
        below[k] = gap * (weights[k] / both) if both > 0.0 else gap / 2
        above[k + 1] = gap * (weights[k + 1] / both) if both > 0.0 else gap / 2
    poles = 0.0
    for k in range(count):
        total = 0.0
        for j in range(k):
            if weights[j] > 0.0:
                total += weights[j] / (theta[j] - theta[k - 1] + below[k - 1])
        for j in range(k + 1, count):
            if weights[j] > 0.0:
                total += weights[j] / (theta[k + 1] - theta[j] + above[k + 1])
        poles = max(poles, total)
    if not poles < _FAR * least:
        return np.inf
    return poles + _largest(theta[count:], g[count:], rho[count:], mu, highest, least)


@njit(cache=True, nogil=True)
def _largest(theta: Any, g: Any, rho: Any, low: float, high: float, least: float) -> float:
    """A bound on |F| over [low, high], all θ below it; infinite where far above ε. Some 20 terms on 15 intervals."""
    terms = numerators(rho, g)
    worst = 0.0
    while low < high and worst < np.inf:
        # An interval as long as it is far from the largest θ, whose middle is three times as far from it as its ends.
        radius = (low - theta[0]) / 2
        middle = low + radius
        if not radius > _NEAREST * middle:
            return np.inf
        worst = max(worst, largest_about(theta, terms, middle, radius, _REST * least, _FAR * least))
        low = middle + radius
    return worst


@njit(cache=True, nogil=True)
def next_count(size: int, block: int, bound: float, before: int, then: float) -> Any:
    """How many vectors to have when the count is tried again; 0 where a second space will take fewer.

    block: vectors of a pass. bound: on |F|, as a multiple of ε, at `size` vectors; then: at `before`, infinite where
    there is none. It falls by a factor of e or more with each pass, until two looks have shown by which.
    """
    if not bound < np.inf:
        return 0.0 if before > 0 else size * (1.0 + _MORE)
    rate = 1.0 / block if not then < np.inf else math.log(then / bound) / (size - before)
    if not rate * _SECOND_SPACE > math.log(bound):
        return 0.0
    return size + max(1.0, math.log(bound) / rate)
