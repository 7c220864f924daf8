"""What Ritz pairs promise, in compiled calls: solvers/goal.py says what is asked, and certificate.py why it holds.

θ (m) descends, g (m×b) has the coordinates of each residual; float64. goal: ||W||_F², the tolerance of the excess,
float32's resolution of ||W||² and the relative error of a product with W. missed: a bound on λ_max outside of the
space.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .eigen import leading_pairs
from .jit import ZERO, njit
from .outside import least_outside, least_shortfall, shortfall_without_eigenvalues

# How many Ritz vectors beyond r may go into X; and at most so many as a rule, since each takes longer in the last pass
# than another one of a second space, which lowers the bound.
_BEYOND = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
FEW_BEYOND, ANY_BEYOND = ZERO + 4, ZERO + 48
# Before the second space has bounded λ_max outside of the first: this share of the Ritz values beyond θ_r is above it
# (0.15 to 0.3 where it pays to look); and the bound is at most this share of θ_r.
_REACHED, _EXPECTED_OUTSIDE = 0.17, 0.93
# The arithmetic is too coarse where what it hides comes to this share of θ_r − c', or f* to this little of the energy.
_COARSE_GAP, _COARSE_ENERGY = 0.05, 1e-5
# Projections are float32's own, also where products are less exact.
_FLOAT32_UNIT = 2.0**-23
# Roundings are independent: what they leave in a residual was a 6th to a 50th of the most that `rounding` allows for.
_EXPECTED_NOISE = 0.25
# A residual of this share of θ: √θ is good to half as much.
_SURE = 0.02
# A proof of this share of what is allowed survives that the last products are float64's, and one of the other as a
# rule.
_AMPLE, _NEARLY = 0.5, 0.9


@njit(cache=True, nogil=True)
def rounding(theta: Any, goal: Any) -> Any:
    """By how much a step of the space, MX = QT + NL, can be off for a unit vector; see certificate.py."""
    energy, _, _, unit = goal
    largest = max(0.0, theta[0])
    return unit * math.sqrt(largest * energy) + min(unit, _FLOAT32_UNIT) * math.sqrt(len(theta)) * largest


@njit(cache=True, nogil=True)
def missing(theta: Any, rank: int, goal: Any) -> Any:
    """What the first Ritz pairs have not captured: f* and the energy they missed."""
    captured = 0.0
    for j in range(rank):
        captured += theta[j]
    return max(0.0, goal[0] - captured)


@njit(cache=True, nogil=True)
def allowed(theta: Any, rank: int, goal: Any) -> Any:
    """How much energy may be missed: the tolerance's share of f*, never less than float32 factors can show."""
    return max(goal[1] * missing(theta, rank, goal), goal[2] * goal[0])


@njit(cache=True, nogil=True)
def promise(theta: Any, g: Any, rank: int, missed: float, goal: Any, enough: float, most: int) -> Any:
    """The least shortfall over the numbers s ≤ rank + most of Ritz vectors to keep, or the first `enough`; its s."""
    highest = theta[rank - 1]
    candidates = np.empty(len(_BEYOND), dtype=np.int64)
    count = 0
    for beyond in _BEYOND:
        if beyond <= most and rank + beyond < len(theta) and theta[rank + beyond] < highest:
            candidates[count] = rank + beyond
            count += 1
    if highest <= missed or count == 0:
        return np.inf, rank
    off = rounding(theta, goal)
    best, kept, _ = least_shortfall(
        theta, g, rank, candidates[:count], missed, off, _EXPECTED_NOISE * off, enough
    )  # fmt: skip
    return best, kept


@njit(cache=True, nogil=True)
def promised(theta: Any, g: Any, ranks: Any, missed: float, goal: Any, enough: float, beyond: int) -> Any:
    """The promise of the rank that is furthest from its allowance, as a multiple of the allowance.

    enough: a multiple below which it does not matter how much better it could be. beyond: how many Ritz vectors beyond
    the rank may be kept for it.
    """
    worst = 0.0
    for rank in ranks:
        most = allowed(theta, rank, goal)
        if missing(theta, rank, goal) > most:
            worst = max(worst, promise(theta, g, rank, missed, goal, enough * most, beyond)[0] / most)
    return worst


@njit(cache=True, nogil=True)
def settled(theta: Any, g: Any, ranks: Any, missed: float, goal: Any) -> Any:
    """Whether every rank is proven, if the last pass finds no more noise than is expected; and by few vectors."""
    if promised(theta, g, ranks, missed, goal, _NEARLY, FEW_BEYOND) <= _NEARLY:
        return True, True
    return promised(theta, g, ranks, missed, goal, 1.0, ANY_BEYOND) <= 1.0, False


@njit(cache=True, nogil=True)
def promised_beyond(theta: Any, g: Any, ranks: Any, count: int, outside: float, goal: Any) -> bool:
    """Whether every rank is proven by the first `count` Ritz vectors, if λ_max outside of those is c' at most.

    It is promised as in `settled`: with as much noise in the last pass as is expected.
    """
    noise = _EXPECTED_NOISE * rounding(theta, goal)
    for rank in ranks:
        most, gap = allowed(theta, rank, goal), theta[rank - 1] - outside
        if missing(theta, rank, goal) > most and not (
            gap > 0.0 and shortfall_without_eigenvalues(theta, g, rank, count, gap, noise, 0.0) <= _NEARLY * most
        ):
            return False
    return True


@njit(cache=True, nogil=True)
def kept(theta: Any, g: Any, ranks: Any, missed: float, goal: Any) -> Any:
    """How many Ritz vectors the proof of all ranks uses."""
    most = 0
    for rank in ranks:
        may_miss = allowed(theta, rank, goal)
        found, number = promise(theta, g, rank, missed, goal, _AMPLE * may_miss, FEW_BEYOND)
        if found > _NEARLY * may_miss:
            found, number = promise(theta, g, rank, missed, goal, _AMPLE * may_miss, ANY_BEYOND)
        most = max(most, number)
    return min(most, len(theta))


@njit(cache=True, nogil=True)
def expected_outside(theta: Any, rank: int, factor: float) -> Any:
    """Roughly how a second space will bound λ_max outside of this one, judging by how far the Ritz values reach.

    factor: `expected_factor` of as many passes as the second space may reasonably take.
    """
    place = min(rank + int(_REACHED * (len(theta) - rank)), len(theta) - 1)
    return min(_EXPECTED_OUTSIDE * max(0.0, theta[rank - 1]), factor * max(0.0, theta[place]))


@njit(cache=True, nogil=True)
def too_coarse(theta: Any, ranks: Any, goal: Any) -> Any:
    """Whether the products' rounding hides what must be proven."""
    rank = 0
    for one in ranks:
        rank = max(rank, one)
    highest = theta[rank - 1]
    off = rounding(theta, goal)
    if off > _COARSE_GAP**2 * highest:
        return True
    hidden = rank * (_EXPECTED_NOISE * off) ** 2 / (_COARSE_GAP * max(highest, 1e-300))
    for one in ranks:
        if missing(theta, one, goal) < _COARSE_ENERGY * goal[0] or hidden > allowed(theta, one, goal):
            return True
    return False


@njit(cache=True, nogil=True)
def bound_to_reach(theta: Any, g: Any, ranks: Any, bounds: Any, goal: Any) -> Any:
    """The first of the bounds on λ_max outside that settles all ranks; the last but one if none does.

    They fall, but for the last, which is tried only where the last but one does not suffice; a smaller one settles what
    a larger one does.
    """
    last = len(bounds) - 1
    reached = last
    for i in range(last - 1, -1, -1):
        if promised(theta, g, ranks, bounds[i], goal, _NEARLY, FEW_BEYOND) > _NEARLY:
            break
        reached = i
    if reached == last and promised(theta, g, ranks, bounds[last], goal, 1.0, ANY_BEYOND) > 1.0:
        reached = last - 1
    return bounds[reached]


@njit(cache=True, nogil=True)
def stops_outside(
    theta: Any, g: Any, ranks: Any, goal: Any, factors: Any, expected: float, bounds: Any, first: int, missed: float
) -> Any:  # fmt: skip
    """The λ_max of the second space after each pass at which it may end: low enough to settle all, or too high.

    factors: `expected_factor` after 1, 2, … passes. expected: the bound on λ_max outside that it is likely to give.
    bounds: on λ_max outside, as shares of θ_r, of which the first that settles all is enough. first: the pass after
    which it may end; missed: a share of θ_r that is too high. Returns (passes, 2), as `expand` takes it.
    """
    highest, off = theta[ranks.max() - 1], rounding(theta, goal)
    tried = np.empty(len(bounds) + 1)
    for i in range(len(bounds)):
        tried[i] = bounds[i] * highest
    tried[-1] = expected
    enough = bound_to_reach(theta, g, ranks, tried, goal)
    stops = np.empty((len(factors), 2))
    for i in range(len(factors)):
        early = i < first - 1
        stops[i, 0] = 0.0 if early else (enough - off) / factors[i] - off
        stops[i, 1] = np.inf if early else missed * highest
    return stops


@njit(cache=True, nogil=True)
def outside_kept(theta: Any, g: Any, count: int, missed: float, goal: Any) -> Any:
    """c', what λ_max outside of the first `count` Ritz vectors is at most; infinite where nothing is known."""
    return least_outside(theta, g, count, missed) + rounding(theta, goal) if missed < np.inf else np.inf


@njit(cache=True, nogil=True)
def verdict(form: Any, residual_gram: Any, ranks: Any, outside: float, goal: Any) -> Any:
    """What a last pass in float64 proves. form: XᵀMX (s×s) of the s leading Ritz vectors; residual_gram: RᵀR.

    outside: c'; infinite where nothing is known.

    Returns the eigenvalues of `form` (s, descending, none below 0), its leading eigenvectors (max(ranks)×s, rows), and
    for each rank the shortfall and whether it is certified. If QL does not converge, which has not been seen, X itself
    takes the place of the eigenvectors, and nothing is certified.
    """
    s = len(form)
    values, vectors, converged = leading_pairs(form, ranks.max())
    if not converged:
        vectors[:] = 0.0
        for i in range(s):
            values[i] = form[i, i]
            if i < len(vectors):
                vectors[i, i] = 1.0
        outside = np.inf
    for i in range(s):
        values[i] = max(0.0, values[i])
    bounds, certified = np.empty(len(ranks)), np.empty(len(ranks), dtype=np.bool_)
    for i, rank in enumerate(ranks):
        lacking = missing(values, rank, goal)
        bounds[i] = min(lacking, shortfall(form, residual_gram, values, rank, outside))
        certified[i] = converged and bounds[i] <= max(goal[1] * (lacking - bounds[i]), goal[2] * goal[0])
    return values, vectors, bounds, certified


@njit(cache=True)
def sure_values(theta: Any, g: Any, first: int, last: int) -> Any:
    """The roots of θ from `first` on, before `last`, as long as residuals say that they are good to 1 %."""
    found = np.empty(max(0, min(last, len(theta)) - first))
    count = 0
    for j in range(first, first + len(found)):
        value, square = max(0.0, theta[j]), 0.0
        for c in range(g.shape[1]):
            square += g[j, c] ** 2
        # What follows one that is not might stand in another's place.
        if square > (_SURE * value) ** 2:
            break
        found[count] = math.sqrt(value)
        count += 1
    return found[:count]


@njit(cache=True, nogil=True)
def shortfall(form: Any, residual_gram: Any, values: Any, rank: int, outside: float) -> Any:
    """The upper bound on Σ_{i≤r} λ_i − Σ_{i≤r} θ_i of certificate.py's third step.

    form (s×s): XᵀMX, in any basis of X. residual_gram (s×s): RᵀR in the same. values: θ. outside: c'; infinite where
    nothing is known.
    """
    if outside == np.inf:
        return np.inf
    gap = values[rank - 1] - outside
    if gap > 0 and len(form) == rank:
        # None of the upper values is below θ_r = c' + t, so that the r largest are theirs, and their sum the trace.
        total = 0.0
        for i in range(rank):
            total += residual_gram[i, i] / gap
        return total
    best = np.inf
    # Without a gap, a little of everything outside may outweigh the last of the θ.
    for power in range(12):
        split = gap if gap > 0 else outside * 10.0 ** -(power + 1)
        if split > 0.0:
            upper, _, converged = leading_pairs(form + residual_gram / split, ZERO)
            total = 0.0
            for i in range(rank):
                total += max(upper[i], outside + split) - values[i]
            if converged:
                best = min(best, total)
        if gap > 0:
            break
    return max(0.0, best)


@njit(cache=True, nogil=True)
def next_size(size: int, now: float, before: int, then: float, wanted: float) -> Any:
    """`goal.next_size`, with `now` for promised."""
    step = 0.12 * size
    if now < then < np.inf:
        rate = math.log(then / now) / (size - before)
        step = min(max(math.log(now / wanted) / rate, 1.0), 0.3 * size)
    return size + step
