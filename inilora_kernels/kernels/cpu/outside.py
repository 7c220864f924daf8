"""The parts of certificate.py's bound that are taken for many numbers s of Ritz vectors, in compiled loops.

Where S(c) = (c − missed)·I − Σ_{j ≥ kept} g_j·g_jᵀ/(c − θ_j) is positive definite: the bound c' of certificate.py.

θ (m) descends, g (m×b) has a row for each; both float64. S grows with c above θ_kept, so that a bisection finds the
least c = c'. S counts as definite if its Cholesky factorization succeeds, which takes no eigenvalues.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import ZERO, njit

# c is found to a 4096th of the range that it may lie in, and no finer than this share of itself.
_HALVINGS, _FINEST = 12, 1e-6
# Another number is tried where it could bring the shortfall below this share of the best so far, and none after one
# that is so many times it.
_WORTH_TRYING, _NO_BETTER = 0.5, 4
# The share of `enough` that may be given up for values equal to θ_r.
_FOR_TIES = 0.25


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
def least_shortfall(
    theta: Any, g: Any, rank: int, kept: Any, missed: float, rounding: float, noise: float, enough: float
) -> Any:  # fmt: skip
    """The least of `shortfall_without_eigenvalues` over the numbers in `kept`, or the first that is `enough`.

    Returns it, its number and its c'. Infinite where c' stays above θ_r.
    """
    highest = theta[rank - 1]
    least = 0.0
    for i in range(rank):
        for c in range(g.shape[1]):
            least += g[i, c] ** 2
    best, best_kept, best_outside = np.inf, rank, np.inf
    form = np.empty((g.shape[1], g.shape[1]))
    for one in kept:
        if not _definite(theta, g, one, highest - rounding, missed, form):
            continue
        outside = least_outside(theta, g, one, missed) + rounding
        gap = highest - outside
        # No shortfall is less than tr P_11.
        if gap <= 0 or least / gap > _WORTH_TRYING * best:
            continue
        found = min(
            shortfall_without_eigenvalues(theta, g, rank, one, gap, noise, 0.0),
            shortfall_without_eigenvalues(theta, g, rank, one, gap, noise, _FOR_TIES * enough / rank + noise**2 / gap),
        )
        if found < best:
            best, best_kept, best_outside = found, one, outside
            if found <= enough:
                break
        elif _NO_BETTER * best < found < np.inf:
            break
    return best, best_kept, best_outside


@njit(cache=True, nogil=True)
def shortfall_without_eigenvalues(
    theta: Any, g: Any, rank: int, kept: int, gap: float, noise: float, above: float
) -> Any:  # fmt: skip
    """A bound on the sum of the r largest eigenvalues of Θ + P, less Σ_{i≤r} θ_i, for P = (RᵀR + noise²·I)/t.

    R's columns are g_i for i < kept; t = gap. For any y ≥ θ_r, Θ + P = [[Θ_1 + P_11, P_12], [P_21, Θ_2 + P_22]], parted
    after the first r, is at most diag(Θ_1 + P_11 + P_12·K⁻¹·P_21, y·I), K = y − Θ_2 − P_22, if K is positive definite;
    so the sum is at most tr(P_11 + P_12·K⁻¹·P_21) + Σ max(0, y − θ_i). All of P comes from R, so that by Woodbury's
    formula the trace is Σ_{i≤r} g_iᵀ(t − S)⁻¹g_i, S = Σ_{j>r} g_j·g_jᵀ/(y − θ_j), and K is positive definite where
    t − S, b×b, is. above: y − θ_r, for θ that are equal. Infinite where t − S is not positive definite.
    """
    form = np.empty((g.shape[1], g.shape[1]))
    spread = noise**2 / gap
    y = theta[rank - 1] + above - spread
    if not _definite(theta[rank:kept], g[rank:kept], ZERO, y, y - gap, form):
        return np.inf
    total = rank * spread
    solved = np.empty(g.shape[1])
    for i in range(rank):
        total += max(0.0, theta[rank - 1] + above - theta[i])
        for c in range(g.shape[1]):
            part = g[i, c]
            for e in range(c):
                part -= form[c, e] * solved[e]
            solved[c] = part / form[c, c]
            total += solved[c] ** 2
    return total


@njit(cache=True, nogil=True)
def _definite(theta: Any, g: Any, kept: int, bound: float, missed: float, form: Any) -> bool:
    """Whether S(bound) is; its Cholesky factor is then in the lower triangle of `form`."""
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
    return bool(definite(form))


@njit(cache=True, nogil=True)
def definite(form: Any) -> bool:
    """Whether a symmetric matrix is positive definite; its lower triangle then becomes its Cholesky factor."""
    for c in range(len(form)):
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
