"""The end of a small matrix's search in one compiled call, which holds no lock: the last pass, and what it proves.

solvers/krylov.py has the same step by step, for every other W. What it takes of torch are calls that each take longer
than a sum over a small W, and that let one matrix's in at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .eigen import leading_vectors, turn_back
from .expansion import multiply
from .gram import BLOCK, add_inner_products, add_outer_by_strips
from .jit import ZERO, njit
from .judgement import verdict
from .orthonormal import cholesky, gram_of, solve
from .team import job
from .tridiagonal import dot, less

# The shortest over the longest of rows that are orthonormal but for float32's rounding is at least that.
_ORTHONORMAL = 0.5


@njit(cache=True, nogil=True)
def conclude(
    W: Any, layout: Any, work: Any, basis: Any, theta: Any, reduced: Any, ranks: Any, outside: float, goal: Any,
    count: int,
) -> Any:  # fmt: skip
    """The leading triplets of W and what a pass in float64 proves of them, if `found`.

    W, layout, work: as `expand` takes them, the work space in float64 and for `count` columns. basis (m, n): of the
    space, float32; theta, reduced: of its Ritz pairs. ranks, outside, goal: as judgement.py has them. count: of Ritz
    vectors that W is multiplied with.

    Reads the basis once, and W twice, the second time from the cache. Returns found; U (max(ranks), d), the
    eigenvalues, V (max(ranks), n); for each rank the shortfall and whether it is certified. It is not found where an
    eigenvector does not come out, or the basis's rows are not independent.
    """
    _, once, _ = work
    by_rows, m, n = layout[0] == 1, layout[2], layout[3]
    width, d = (once.shape[1], m) if by_rows else (once.shape[0], n)
    X, image, Y = np.zeros((width, basis.shape[1])), np.empty((width, basis.shape[1])), np.empty((width, d))
    if not _leading(basis, theta, reduced, count, X):
        return False, X, theta, X, theta, np.empty(0, dtype=np.bool_)
    multiply(W, layout, work, X, image, job())
    for c in range(width):
        for i in range(d):
            Y[c, i] = once[i, c] if by_rows else once[c, i]
    form = _inner(Y, count)
    turned = _turned(form, X)
    for c in range(count):
        less(image[c], 1.0, turned[c])
    values, chosen, shortfalls, certified = verdict(form, _inner(image, count), ranks, outside, goal)
    U = _turned(chosen, Y)
    for c in range(len(U)):
        square = dot(U[c], U[c])
        if square > 0.0:
            scale = 1.0 / np.sqrt(square)
            for i in range(d):
                U[c, i] *= scale
    return True, U, values, _turned(chosen, X), shortfalls, certified


@njit(cache=True, nogil=True)
def _leading(basis: Any, theta: Any, reduced: Any, count: int, X: Any) -> bool:
    """The first `count` Ritz vectors in X's rows: summed in the basis's float32, then made orthonormal in float64."""
    m, n = basis.shape
    coefficients, weights = np.empty((count, m)), np.zeros((m, len(X)), dtype=np.float32)
    if not leading_vectors(reduced, theta, coefficients):
        return False
    turn_back(reduced, coefficients)
    for c in range(count):
        for i in range(m):
            weights[i, c] = coefficients[c, i]
    sums = np.zeros(X.shape, dtype=np.float32)
    add_outer_by_strips(basis.reshape(-1), n, m, ZERO, n, weights, sums)
    gram, triangle = np.empty((count, count)), np.zeros((count, count))
    gram_of(sums, gram)
    # The basis is orthonormal to float32's rounding, so that one Cholesky QR makes these rows so to float64's.
    if not cholesky(gram, triangle, _ORTHONORMAL):
        return False
    solve(triangle, sums, X)
    return True


@njit(cache=True, nogil=True)
def _inner(rows: Any, count: int) -> Any:
    """The inner products (count, count) of the first rows, of which there is a whole number of blocks."""
    width, n = rows.shape
    out = np.zeros((width, width))
    add_inner_products(rows.reshape(-1), n, ZERO, width, ZERO, n, rows, out, ZERO)
    return out[:count, :count].copy()


@njit(cache=True, nogil=True)
def _turned(coefficients: Any, rows: Any) -> Any:
    """coefficients (s, count) · the first `count` rows."""
    (s, count), n = coefficients.shape, rows.shape[1]
    weights = np.zeros((count, (s + BLOCK - 1) // BLOCK * BLOCK))
    for c in range(s):
        for i in range(count):
            weights[i, c] = coefficients[c, i]
    out = np.zeros((weights.shape[1], n))
    add_outer_by_strips(rows.reshape(-1), n, count, ZERO, n, weights, out)
    return out[:s]
