"""Where S(c) = (c − missed)·I − Σ_{j ≥ kept} g_j·g_jᵀ/(c − θ_j) is positive definite: the bound c' of certificate.py.

θ (m) descends, g (m×b) has a row for each; both float64. S grows with c above θ_kept, so that a bisection finds the
least c. S counts as definite if its Cholesky factorization succeeds, which takes no eigenvalues.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import njit

# c is found to a 4096th of the range that it may lie in, and no finer than this share of itself.
_HALVINGS, _FINEST = 12, 1e-6


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
