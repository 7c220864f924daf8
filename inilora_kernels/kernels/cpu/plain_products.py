"""The two products of a Gram pass in loops that numba vectorizes as they stand, in float32 or float64.

In float32 they take what fills no block of registers; in float64 they are the whole product. W lies in its own
dtype, and X has a multiple of four columns.
"""

from __future__ import annotations

from typing import Any

from .jit import njit
from .simd import entry

# Sums may be taken in any order, which is what the vector units need; nothing is assumed of NaN or Inf.
SUMS = frozenset({"reassoc", "contract", "nsz"})


@njit(cache=True, nogil=True, fastmath=SUMS)
def _add_inner(W: Any, at: int, stride: int, count: int, X: Any, column: int, left: int, out: Any, row: int) -> None:
    """out[row + i, column + c] += Σ_j W_i[j]·X[column + c, left + j] for 4 rows W_i = W[at + i·stride…] and 4 c."""
    W0, W1 = W[at : at + count], W[at + stride : at + stride + count]
    W2, W3 = W[at + 2 * stride : at + 2 * stride + count], W[at + 3 * stride : at + 3 * stride + count]
    X0, X1 = X[column, left : left + count], X[column + 1, left : left + count]
    X2, X3 = X[column + 2, left : left + count], X[column + 3, left : left + count]
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = X.dtype.type(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = X.dtype.type(0)
    for j in range(count):
        w0, w1, w2, w3 = entry(W0, j), entry(W1, j), entry(W2, j), entry(W3, j)
        x0, x1, x2, x3 = X0[j], X1[j], X2[j], X3[j]
        s00 += w0 * x0
        s01 += w0 * x1
        s02 += w0 * x2
        s03 += w0 * x3
        s10 += w1 * x0
        s11 += w1 * x1
        s12 += w1 * x2
        s13 += w1 * x3
        s20 += w2 * x0
        s21 += w2 * x1
        s22 += w2 * x2
        s23 += w2 * x3
        s30 += w3 * x0
        s31 += w3 * x1
        s32 += w3 * x2
        s33 += w3 * x3
    for i, sums in enumerate(((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23), (s30, s31, s32, s33))):
        for c in range(4):
            out[row + i, column + c] += sums[c]


@njit(cache=True, nogil=True, fastmath=SUMS)
def _add_outer(W: Any, at: int, stride: int, count: int, X: Any, row: int, column: int, out: Any, left: int) -> None:
    """out[column + c, left + j] += Σ_{i<4} X[row + i, column + c]·W_i[j] for 4 rows W_i = W[at + i·stride…] and 4 c."""
    W0, W1 = W[at : at + count], W[at + stride : at + stride + count]
    W2, W3 = W[at + 2 * stride : at + 2 * stride + count], W[at + 3 * stride : at + 3 * stride + count]
    out0, out1 = out[column, left : left + count], out[column + 1, left : left + count]
    out2, out3 = out[column + 2, left : left + count], out[column + 3, left : left + count]
    x00, x01, x02, x03 = X[row, column], X[row, column + 1], X[row, column + 2], X[row, column + 3]
    x10, x11, x12, x13 = X[row + 1, column], X[row + 1, column + 1], X[row + 1, column + 2], X[row + 1, column + 3]
    x20, x21, x22, x23 = X[row + 2, column], X[row + 2, column + 1], X[row + 2, column + 2], X[row + 2, column + 3]
    x30, x31, x32, x33 = X[row + 3, column], X[row + 3, column + 1], X[row + 3, column + 2], X[row + 3, column + 3]
    for j in range(count):
        w0, w1, w2, w3 = entry(W0, j), entry(W1, j), entry(W2, j), entry(W3, j)
        out0[j] += x00 * w0 + x10 * w1 + x20 * w2 + x30 * w3
        out1[j] += x01 * w0 + x11 * w1 + x21 * w2 + x31 * w3
        out2[j] += x02 * w0 + x12 * w1 + x22 * w2 + x32 * w3
        out3[j] += x03 * w0 + x13 * w1 + x23 * w2 + x33 * w3


@njit(cache=True, nogil=True, fastmath=SUMS)
def _add_inner_row(W: Any, at: int, count: int, X: Any, column: int, left: int, out: Any, row: int) -> None:
    """`_add_inner` for a single row, where fewer than four are left."""
    for c in range(column, column + 4):
        total = X.dtype.type(0)
        for j in range(count):
            total += entry(W, at + j) * X[c, left + j]
        out[row, c] += total


@njit(cache=True, nogil=True, fastmath=SUMS)
def _add_outer_row(W: Any, at: int, count: int, X: Any, row: int, column: int, out: Any, left: int) -> None:
    """`_add_outer` for a single row, where fewer than four are left."""
    for c in range(column, column + 4):
        x = X[row, c]
        for j in range(count):
            out[c, left + j] += x * entry(W, at + j)


@njit(cache=True, nogil=True)
def add_inner_plain(W: Any, stride: int, top: int, bottom: int, left: int, count: int, X: Any, out: Any) -> None:
    """out[i, c] += Σ_j W[i, left + j]·X[c, left + j] for rows [top, bottom) of W and all c, in X's dtype."""
    whole = top + (bottom - top) // 4 * 4
    for i in range(top, whole, 4):
        for column in range(0, X.shape[0], 4):
            _add_inner(W, i * stride + left, stride, count, X, column, left, out, i)
    for i in range(whole, bottom):
        for column in range(0, X.shape[0], 4):
            _add_inner_row(W, i * stride + left, count, X, column, left, out, i)


@njit(cache=True, nogil=True)
def add_outer_plain(W: Any, stride: int, top: int, bottom: int, left: int, count: int, X: Any, out: Any) -> None:
    """out[c, left + j] += Σ_i X[i, c]·W[i, left + j] for rows [top, bottom) of W and all c, in X's dtype."""
    whole = top + (bottom - top) // 4 * 4
    for i in range(top, whole, 4):
        for column in range(0, X.shape[1], 4):
            _add_outer(W, i * stride + left, stride, count, X, i, column, out, left)
    for i in range(whole, bottom):
        for column in range(0, X.shape[1], 4):
            _add_outer_row(W, i * stride + left, count, X, i, column, out, left)
