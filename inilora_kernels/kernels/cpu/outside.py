"""The parts of certificate.py's bound that are taken for many numbers s of Ritz vectors, in compiled loops.

Where S(c) = (c − missed)·I − Σ_{j ≥ kept} g_j·g_jᵀ/(c − θ_j) is positive definite: the bound c' of certificate.py.

θ (m) descends, g (m×b) has a row for each; both float64. S grows with c above θ_kept, so that a bisection finds the
least c = c'. S counts as definite if its Cholesky factorization succeeds, which takes no eigenvalues.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import njit

# c is found to a 4096th of the range that it may lie in, and no finer than this share of itself.
_HALVINGS, _FINEST = 12, 1e-6
# How far below θ_r what lies among other Ritz vectors may end, as a share of the way to θ_{r+1}.
_SHARES_APART = (0.9, 0.6, 0.3)
# By which share a bound without eigenvalues may be above the one with them.
_CLOSE = 0.1
# Another number is tried where it could bring the shortfall below this share of the best so far, and none after one
# that is so many times it.
_WORTH_TRYING, _NO_BETTER = 0.5, 4


@njit(cache=True, nogil=True)
def least_outside(theta: Any, g: Any, kept: int, missed: float) -> Any:
    """The least c > θ_kept with S(c) positive definite, from above. Reads g once for each halving."""
    if kept == len(theta):
        return missed
    squares = 0.0
    for j in range(kept, len(theta)):
        for c in range(g.shape[1]):
            squares += g[j, c] ** 2
    low = max(missed, theta[kept])
    # S is definite here: |Σ g·gᵀ/(c − θ)| ≤ |g|²/(c − θ_kept) ≤ |g| ≤ c − missed.
    high = low + np.sqrt(squares)
    form = np.empty((g.shape[1], g.shape[1]))
    for _ in range(_HALVINGS):
        if high <= low * (1 + _FINEST):
            break
        middle = (low + high) / 2
        if _definite(theta, g, kept, middle, missed, form):
            high = middle
        else:
            low = middle
    return high


@njit(cache=True, nogil=True)
def outside_below(theta: Any, g: Any, kept: Any, bound: float, missed: float) -> Any:
    """For each number in `kept`, the least c; infinite where S(bound) is not positive definite."""
    form = np.empty((g.shape[1], g.shape[1]))
    found = np.full(len(kept), np.inf)
    for place in range(len(kept)):
        if _definite(theta, g, kept[place], bound, missed, form):
            found[place] = least_outside(theta, g, kept[place], missed)
    return found


@njit(cache=True, nogil=True)
def least_shortfall(
    theta: Any, g: Any, rank: int, kept: Any, missed: float, rounding: float, noise: float, enough: float
) -> Any:  # fmt: skip
    """The least of the shortfalls of certificate.py over the numbers in `kept`, or the first that is `enough`.

    Returns it, its number and its c', and whether eigenvalues, which are not used here, might make one `enough`: see
    `apart_shortfall`. Infinite where c' stays above θ_rank, or the leading θ are not apart.
    """
    highest = theta[rank - 1]
    least = 0.0
    for i in range(rank):
        for c in range(g.shape[1]):
            least += g[i, c] ** 2
    best, best_kept, best_outside, loose = np.inf, rank, np.inf, False
    form = np.empty((g.shape[1], g.shape[1]))
    for one in kept:
        if not _definite(theta, g, one, highest - rounding, missed, form):
            continue
        outside = least_outside(theta, g, one, missed) + rounding
        gap = highest - outside
        # The sum of the r largest eigenvalues is no less than that of the first r diagonal entries.
        if gap <= 0 or least / gap > _WORTH_TRYING * best:
            continue
        found, close = apart_shortfall(theta, g, rank, one, gap, noise, enough)
        loose = loose or (not close and least / gap <= enough)
        if found < best:
            best, best_kept, best_outside = found, one, outside
            if found <= enough:
                break
        elif close and found > _NO_BETTER * best:
            break
    return best, best_kept, best_outside, loose


@njit(cache=True, nogil=True)
def apart_shortfall(theta: Any, g: Any, rank: int, kept: int, gap: float, noise: float, enough: float) -> Any:
    """A bound on the sum of the r largest eigenvalues of Θ + P, less Σθ_i, and whether no other could be `enough`.

    P = (RᵀR + noise²·I)/t, R's columns g_i for i < kept, t = gap. With [[P_11, P_12], [P_21, P_22]] for the first r and
    the others, what lies among the others is at most x, a number between θ_{r+1} and θ_r, if x − Θ_2 − P_22 is positive
    definite; so the sum is below tr P_11 + |P_12|²/(θ_r − x), and close to it where the second term is small. Where x
    would have to be above θ_r + enough, the largest of the others takes θ_r's place, and the sum is more than enough.
    """
    own = mixed = 0.0
    for i in range(rank):
        for c in range(g.shape[1]):
            own += g[i, c] ** 2
    own = (own + rank * noise**2) / gap
    if kept == rank:
        return own, True
    form = np.empty((g.shape[1], g.shape[1]))
    others, residuals, highest = theta[rank:kept], g[rank:kept], theta[rank - 1] - noise**2 / gap
    # By Schur's complement, as for c'.
    if not _definite(others, residuals, 0, highest + enough, highest + enough - gap, form):
        return np.inf, True
    apart = 0.0
    for share in _SHARES_APART:
        below = share * (theta[rank - 1] - theta[rank])
        if _definite(others, residuals, 0, highest - below, highest - below - gap, form):
            apart = below
            break
    if apart == 0.0:
        return np.inf, False
    for i in range(rank):
        for j in range(rank, kept):
            inner = 0.0
            for c in range(g.shape[1]):
                inner += g[i, c] * g[j, c]
            mixed += (inner / gap) ** 2
    return own + mixed / apart, mixed <= _CLOSE * own * apart


@njit(cache=True, nogil=True)
def _definite(theta: Any, g: Any, kept: int, bound: float, missed: float, form: Any) -> bool:
    b = len(form)
    if kept < len(theta) and not bound > theta[kept]:
        return False
    form[:] = 0.0
    for c in range(b):
        form[c, c] = bound - missed
    for j in range(kept, len(theta)):
        weight = 1.0 / (bound - theta[j])
        for c in range(b):
            scaled = weight * g[j, c]
            for e in range(c + 1):
                form[c, e] -= scaled * g[j, e]
    for c in range(b):
        for e in range(c + 1):
            total = form[c, e]
            for i in range(e):
                total -= form[c, i] * form[e, i]
            if e < c:
                form[c, e] = total / form[e, e]
            elif total > 0.0:
                form[c, c] = np.sqrt(total)
            else:
                return False
    return True
