"""A block of vectors made orthonormal, and orthogonal to a basis: one compiled call where torch takes forty small ones.

Rows are vectors, float32; sums that decide on the result, those within the block, are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rounding import round_up
from .gram import BLOCK, add_inner_products, add_outer_by_strips
from .in_place import WIDE_ROWS
from .jit import ZERO, njit
from .plain_products import SUMS

# From all rows: one as a rule, a second where much of a row was along rows other than the last.
_MOST_PROJECTIONS = 3


def orthonormal_against(
    Q: Tensor, fixed: Tensor | None, Z: Tensor, *, vanished: float, spread: float, long: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows X (b×n), orthonormal and orthogonal to those of Q (m×n) and of `fixed`.

    Z = βᵀX + alongᵀQ + what it has along `fixed`. Where Z is M times the last b rows of a Krylov space, nearly all that
    it has along Q is along the last 2b rows; so these are taken out of it first, then all rows, each time followed by
    Cholesky QR, and all again where a unit row has not stayed longer than `long`. Returns X, β (b×b) and
    `along` (m×b), float64; None where that is not enough: a row becomes shorter than `vanished` times what it was, the
    triangle's diagonal spans more than 1/`spread`, or the rows are not `long` after _MOST_PROJECTIONS.

    >>> X, coupling, along = orthonormal_against(
    ...     torch.eye(1, 8), None, torch.full((1, 8), 2.0), vanished=1e-6, spread=1e-6, long=0.5
    ... )
    >>> [round(float(number), 4) for number in (X[0, 0], X[0, 1], coupling[0, 0], along[0, 0])]
    [0.0, 0.378, 5.2915, 2.0]
    """
    b, n = Z.shape
    X = torch.zeros(round_up(b, BLOCK), n, dtype=torch.float32)
    X[:b] = Z
    along, coupling = np.zeros((len(Q), b)), np.eye(b)
    held = Q[:0] if fixed is None else fixed
    if not make_orthonormal(Q.numpy(), held.numpy(), X.numpy(), coupling, along, vanished, spread, long):
        return None
    return X[:b], torch.from_numpy(coupling), torch.from_numpy(along)


@njit(cache=True, nogil=True)
def make_orthonormal(
    Q: Any, fixed: Any, X: Any, coupling: Any, along: Any, vanished: float, spread: float, long: float
) -> bool:
    """X (b rounded up, n) in place, coupling (b, b) from the identity and along (m, b) from zero.

    Reads Q and `fixed` twice for each projection from all rows, one as a rule, and X a few times from the cache.
    """
    b, n = len(coupling), X.shape[1]
    parts = np.empty((max(len(Q), len(fixed)), len(X)), dtype=np.float32)
    wide, gram, triangle = np.empty((b, n)), np.empty((b, b)), np.zeros((b, b))
    _gram(X, gram)
    lengths = np.sqrt(np.diag(gram))
    for attempt in range(1 + _MOST_PROJECTIONS):
        first = max(0, len(Q) - 2 * b) if attempt == 0 else 0
        if attempt and len(fixed):
            _project(fixed, X, parts)
        if first < len(Q):
            _project(Q[first:], X, parts)
            for i in range(first, len(Q)):
                for c in range(b):
                    for e in range(b):
                        along[i, e] -= parts[i - first, c] * coupling[c, e]
        _gram(X, gram)
        stayed_long = True
        for c in range(b):
            if not gram[c, c] > (vanished * lengths[c]) ** 2:
                return False
            stayed_long = stayed_long and gram[c, c] > long**2
        if not _cholesky(gram, triangle, spread):
            return False
        _solve(triangle, X, wide)
        coupling[:] = _product(triangle, coupling)
        if attempt and stayed_long:
            return True
        # What rounding is to Z, it is to these unit rows, as long as the triangle is no smaller than that.
        for c in range(b):
            shrunk = np.sqrt(gram[c, c]) / lengths[c]
            lengths[c] = 1.0 / min(1.0, shrunk) if attempt == 0 else 1.0
    return False


@njit(cache=True, nogil=True)
def _project(Q: Any, X: Any, parts: Any) -> None:
    """parts = −QXᵀ and X += partsᵀQ: the components of X's rows along Q's rows are removed."""
    m, n = Q.shape
    flat = Q.reshape(-1)
    parts[:m] = 0
    add_inner_products(flat, n, ZERO, m, ZERO, n, X, parts, WIDE_ROWS * n)
    for i in range(m):
        for c in range(len(X)):
            parts[i, c] = -parts[i, c]
    add_outer_by_strips(flat, n, m, ZERO, n, parts, X)


@njit(cache=True, nogil=True, fastmath=SUMS)
def _gram(X: Any, gram: Any) -> None:
    """XXᵀ of the first rows, as many as gram has, in float64."""
    for c in range(len(gram)):
        for e in range(c + 1):
            total = 0.0
            x, y = X[c], X[e]
            for j in range(len(x)):
                total += np.float64(x[j]) * np.float64(y[j])
            gram[c, e] = gram[e, c] = total


@njit(cache=True, nogil=True)
def _cholesky(gram: Any, triangle: Any, spread: float) -> bool:
    """gram = RᵀR, R upper; False where R's diagonal spans too much."""
    b = len(gram)
    for c in range(b):
        for e in range(c, b):
            total = gram[c, e]
            for i in range(c):
                total -= triangle[i, c] * triangle[i, e]
            if e == c:
                if not total > 0.0:
                    return False
                triangle[c, c] = np.sqrt(total)
            else:
                triangle[c, e] = total / triangle[c, c]
    diagonal = np.diag(triangle)
    return bool(diagonal.min() > spread * diagonal.max())


@njit(cache=True, nogil=True)
def _solve(triangle: Any, X: Any, wide: Any) -> None:
    """X = R⁻ᵀX, in float64 from row to row; rounded once."""
    for c in range(len(triangle)):
        row = wide[c]
        for j in range(len(row)):
            row[j] = np.float64(X[c, j])
        for e in range(c):
            factor, other = triangle[e, c], wide[e]
            for j in range(len(row)):
                row[j] -= factor * other[j]
        scale = 1.0 / triangle[c, c]
        for j in range(len(row)):
            row[j] *= scale
            X[c, j] = np.float32(row[j])


@njit(cache=True, nogil=True)
def _product(left: Any, right: Any) -> Any:
    found = np.zeros_like(right)
    for i in range(len(left)):
        for j in range(right.shape[1]):
            for k in range(len(right)):
                found[i, j] += left[i, k] * right[k, j]
    return found
