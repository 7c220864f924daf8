"""What follows the triplets of a small matrix at a low rank, each step in one compiled call.

initializations.py, gauge.py and optimum.py have the same by torch, for all others: its calls take longer than sums over
so few numbers. These keep the interpreter's lock: threads that work side by side would wait longer for it than a call
takes. Rows are contiguous; sums are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import njit
from .plain_products import SUMS

_MOST_SWEEPS = 30
# Columns are orthogonal to float64's rounding below the first number; one that is shorter by the second is none.
_ORTHOGONAL, _INDEPENDENT = 4e-16, 1e-10


@njit(cache=True, nogil=True)
def balanced(U: Any, S: Any, V: Any) -> Any:
    """√S·U (r×d) and √S·V (r×k) in float32, of rows U and V."""
    B, A = np.empty(U.shape, np.float32), np.empty(V.shape, np.float32)
    for i in range(len(S)):
        root = np.sqrt(S[i])
        for j in range(U.shape[1]):
            B[i, j] = np.float32(root * U[i, j])
        for j in range(V.shape[1]):
            A[i, j] = np.float32(root * V[i, j])
    return B, A


@njit(cache=True, nogil=True)
def nearest(B: Any, A: Any, B_start: Any, A_start: Any) -> Any:
    """GᵀB (r×d) and GᵀA (r×k) of `gauge.nearest`, in float32, and whether G was found.

    All are rows, float32. G is not found where B·B_startᵀ + A·A_startᵀ is nearly singular.
    """
    r = len(B)
    M = _inner(A, A_start) + _inner(B, B_start)
    X, Y, found = _orthogonal(M)
    G = np.zeros((r, r))
    for i in range(r):
        for c in range(r):
            for j in range(r):
                G[i, c] += X[j, i] * Y[j, c]
    return _turned(G, B), _turned(G, A), found


@njit(cache=True, nogil=True)
def apart(B: Any, A: Any, U: Any, S: Any, V: Any) -> float:
    """||D||² of `optimum.loss_near`: D = BᵀA − Uᵀ·diag(S)·V, of rows."""
    total = 0.0
    BB, AA, BU, AV = _inner(B, B), _inner(A, A), _inner(B, U), _inner(A, V)
    for i in range(len(B)):
        for j in range(len(B)):
            total += BB[i, j] * AA[i, j]
        for j in range(len(S)):
            total -= 2 * BU[i, j] * AV[i, j] * S[j]
    for j in range(len(S)):
        total += S[j] ** 2
    return total


@njit(cache=True, fastmath=SUMS)
def _inner(left: Any, right: Any) -> Any:
    """left·rightᵀ (r×s), float64, of rows (r×n) and (s×n), float32 or float64. Reads `right` r times, from a cache."""
    r, n = left.shape
    found = np.empty((r, len(right)))
    for i in range(r):
        for e in range(len(right)):
            total = 0.0
            x, y = left[i], right[e]
            for j in range(n):
                total += np.float64(x[j]) * np.float64(y[j])
            found[i, e] = total
    return found


@njit(cache=True, nogil=True)
def _turned(G: Any, rows: Any) -> Any:
    """Gᵀ·rows (r×n) of float32 rows, rounded once."""
    r, n = rows.shape
    found, sums = np.empty_like(rows), np.empty(n)
    for c in range(r):
        sums[:] = 0.0
        for i in range(r):
            factor, row = G[i, c], rows[i]
            for j in range(n):
                sums[j] += factor * np.float64(row[j])
        for j in range(n):
            found[c, j] = np.float32(sums[j])
    return found


@njit(cache=True, nogil=True)
def _orthogonal(M: Any) -> Any:
    """Rows X, Y with M (r×r) = Σ_j σ_j·X_jᵀY_j, by one-sided Jacobi rotations; and whether all σ are clearly above 0.

    Rotations of M's columns make them orthogonal, whatever their lengths (Demmel and Veselić 1992, SIAM J. Matrix Anal.
    Appl. 13): X has them normalized, Y the same rotations of the identity. Rows hold columns.
    """
    r = len(M)
    X, Y = np.ascontiguousarray(M.T), np.eye(r)
    for _ in range(_MOST_SWEEPS):
        orthogonal = True
        for i in range(r):
            for j in range(i + 1, r):
                a = b = c = 0.0
                for n in range(r):
                    a += X[i, n] * X[i, n]
                    b += X[j, n] * X[j, n]
                    c += X[i, n] * X[j, n]
                if abs(c) <= _ORTHOGONAL * np.sqrt(a * b):
                    continue
                orthogonal = False
                half = (b - a) / (2 * c)
                tangent = (1.0 if half >= 0 else -1.0) / (abs(half) + np.sqrt(1 + half * half))
                cosine = 1 / np.sqrt(1 + tangent * tangent)
                sine = cosine * tangent
                for n in range(r):
                    x, y = X[i, n], X[j, n]
                    X[i, n], X[j, n] = cosine * x - sine * y, sine * x + cosine * y
                    x, y = Y[i, n], Y[j, n]
                    Y[i, n], Y[j, n] = cosine * x - sine * y, sine * x + cosine * y
        if orthogonal:
            break
    lengths = np.empty(r)
    for i in range(r):
        lengths[i] = np.sqrt(np.sum(X[i] * X[i]))
    found = orthogonal and lengths.min() > _INDEPENDENT * lengths.max()
    if found:
        for i in range(r):
            X[i] /= lengths[i]
    return X, Y, found
