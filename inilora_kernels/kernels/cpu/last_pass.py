"""Triplets in float64, in compiled calls: from the vectors of a search and its last pass, or from all of a small WᵀW.

Rows are vectors. Sums over long rows are plain_products.py's, which take blocks of four rows and columns, so that all
that they are given is padded with zeros to a multiple of four.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .eigen import leading_pairs
from .jit import ZERO, njit
from .outside import definite
from .gram import add_inner_products, add_outer_products

_BLOCK = 4
# Columns at a time that stay in the second cache.
_COLUMNS = 512


@njit(cache=True, nogil=True)
def combine(rows: Any, coefficients: Any) -> Any:
    """The combinations of orthonormal rows (m×n) with these coefficients (s×m), orthonormal too (s×n), in float64.

    Reads `rows` s/4 times, by columns that stay in a cache.
    """
    X = combined(rows, coefficients)
    s = len(X)
    # The rows are orthonormal to float32's rounding, so that one Cholesky QR makes the combinations so to float64's.
    gram = inner(X, X)
    if not definite(gram):
        gram[:] = np.nan
    inverse = np.eye(s)
    for c in range(s):
        for e in range(c):
            for i in range(e + 1):
                inverse[c, i] -= gram[c, e] * inverse[e, i]
        for i in range(c + 1):
            inverse[c, i] /= gram[c, c]
    turn(X, inverse)
    return X


@njit(cache=True, nogil=True)
def forms(X: Any, Y: Any, image: Any) -> Any:
    """XᵀMX and RᵀR (s×s) of a last pass, for `verdict`. X (s×k), Y (s×d): XWᵀ, image (s×k): XM; R = MX − X·XᵀMX."""
    form = inner(Y, Y)
    s, n = X.shape
    weights = _weights(form)
    R, products = _strip(s, n), np.zeros((s, weights.shape[1]))
    for left in range(0, n, _COLUMNS):
        count = min(_COLUMNS, n - left)
        _combine_strip(X, left, count, weights, R)
        for i in range(s):
            for j in range(count):
                R[i, j] = image[i, left + j] - R[i, j]
        add_inner_products(R.reshape(-1), R.shape[1], ZERO, s, ZERO, count, R, products, ZERO)
    return form, products[:, :s].copy()


@njit(cache=True, nogil=True)
def combined(rows: Any, coefficients: Any) -> Any:
    """coefficients (s×m) times rows (m×n), in float64."""
    s, m = coefficients.shape
    n = rows.shape[1]
    weights = _weights(coefficients)
    found = np.zeros((weights.shape[1], n))
    flat = rows.reshape(-1)
    for left in range(0, n, _COLUMNS):
        add_outer_products(flat, n, ZERO, m, left, min(_COLUMNS, n - left), weights, found, ZERO)
    return found[:s]


@njit(cache=True, nogil=True)
def turn(rows: Any, coefficients: Any) -> None:
    """The first s of m rows (m×n, float64) become coefficients (s×m) times all of them."""
    s, n = len(coefficients), rows.shape[1]
    weights, strip = _weights(coefficients), _strip(s, n)
    for left in range(0, n, _COLUMNS):
        count = min(_COLUMNS, n - left)
        _combine_strip(rows, left, count, weights, strip)
        rows[:s, left : left + count] = strip[:s, :count]


@njit(cache=True, nogil=True)
def _combine_strip(rows: Any, left: int, count: int, weights: Any, strip: Any) -> None:
    """The first columns of `strip` become weightsᵀ times `count` columns of the rows."""
    strip[:, :count] = 0.0
    add_outer_products(rows.reshape(-1)[left:], rows.shape[1], ZERO, len(rows), ZERO, count, weights, strip, ZERO)


@njit(cache=True, nogil=True)
def _weights(coefficients: Any) -> Any:
    """Their transpose, padded."""
    s, m = coefficients.shape
    weights = np.zeros((m, (s + _BLOCK - 1) // _BLOCK * _BLOCK))
    weights[:, :s] = coefficients.T
    return weights


@njit(cache=True, nogil=True)
def _strip(rows: int, n: int) -> Any:
    """Zeros for the columns that are taken at a time of so many rows, padded."""
    return np.zeros(((rows + _BLOCK - 1) // _BLOCK * _BLOCK, min(n, _COLUMNS)))


@njit(cache=True, nogil=True)
def inner(left: Any, right: Any) -> Any:
    """left·rightᵀ of two sets of rows, in float64."""
    s, n = right.shape
    strip = _strip(s, n)
    found = np.zeros((len(left), len(strip)))
    flat = left.reshape(-1)
    for at in range(0, n, _COLUMNS):
        count = min(_COLUMNS, n - at)
        strip[:s, :count] = right[:, at : at + count]
        add_inner_products(flat[at:], n, ZERO, len(left), ZERO, count, strip, found, ZERO)
    return found[:, :s].copy()


@njit(cache=True, nogil=True)
def by_gram(W: Any, count: int) -> Any:
    """The `count` leading triplets of a small W (d×k, float64) from WᵀW, formed and solved whole.

    Returns U (count×d) and V (count×k), rows, S (count), and whether that worked.
    """
    gram = combined(W, np.ascontiguousarray(W.T))
    _, V, converged = leading_pairs(gram, count)
    U = inner(V, W)
    S = np.zeros(count)
    for i in range(count):
        S[i] = np.sqrt(np.sum(U[i] * U[i]))
        if S[i] > 0:
            U[i] /= S[i]
    return U, S, V, converged
