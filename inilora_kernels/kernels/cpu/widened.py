"""The first product of a float64 pass over W: its entries become float64 once, for all columns of X.

Where each block of columns made them so anew, that would take as long as its sums: three instructions for four entries
of bfloat16. What is widened at a time stays in the caches meanwhile. X lies in rows of whole cache lines.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from .in_place import WIDE_VECTORS
from .jit import ZERO, njit
from .simd import CACHE_LINE, GROUP, LANES, ROWS, SMALL_GROUP, entry, outer_products

# Columns of X in a block of registers, a cache line's, and as many rows of W as fill the registers with sums.
COLUMNS, _LANES = CACHE_LINE // 8, LANES // 2
_BLOCK_ROWS = ROWS * GROUP // (COLUMNS // _LANES)
# The other product's block has SMALL_GROUP columns of X and so many of W.
_RUN = _LANES * WIDE_VECTORS
# Columns of W that are widened at a time: with the rows of a block, some third of a first cache; with _DEPTH, a fifth
# of a second one.
_ALONG, ACROSS, _DEPTH = 1536 // _BLOCK_ROWS, 240, 48
# Rows a power of two apart would push each other out of the first cache.
_APART = CACHE_LINE // 8


def lines_of(columns: int) -> tuple[int, int]:
    """How X's rows of so many columns lie: an odd number of cache lines, and what a line holds.

    >>> lines_of(4), lines_of(16)
    ((1, 8), (3, 8))
    """
    lines = ceil(columns / COLUMNS)
    return lines + 1 - lines % 2, COLUMNS


@njit(cache=True, nogil=True)
def _widen(W: Any, at: int, count: int, out: Any) -> None:
    for j in range(count):
        out[j] = entry(W, at + j)


@njit(cache=True, nogil=True)
def along_rows(W: Any, stride: int, top: int, bottom: int, n: int, X: Any, Y: Any) -> None:
    """Y[i, c] = Σ_j W[i, j]·X_j[c] for rows [top, bottom) of the matrix W of n columns, and all c that Y has.

    X (n, lines, COLUMNS), Y (m, b); b a multiple of SMALL_GROUP. Reads X from the second cache, and reads and writes
    Y's rows once for _ALONG columns of W, of which _BLOCK_ROWS rows are widened at a time.
    """
    b, across = Y.shape[1], X.shape[1] * COLUMNS
    whole = b // COLUMNS * COLUMNS
    wide, sums = np.zeros((_BLOCK_ROWS, _ALONG + _APART)), np.empty(_BLOCK_ROWS * b)
    wide_flat, X_flat, Y_flat = wide.reshape(-1), X.reshape(-1), Y.reshape(-1)
    Y[top:bottom] = 0.0
    for left in range(ZERO, n, _ALONG):
        count = min(_ALONG, n - left)
        for i in range(top, bottom, _BLOCK_ROWS):
            rows = min(_BLOCK_ROWS, bottom - i)
            for p in range(rows):
                _widen(W, (i + p) * stride + left, count, wide[p])
            if rows == _BLOCK_ROWS:
                out, at = Y_flat, i * b
            else:
                sums[:] = 0.0
                out, at = sums, ZERO
            for c in range(0, whole, COLUMNS):
                outer_products(
                    out, at + c, b, wide_flat, ZERO, 1, wide.shape[1], X_flat, left * across + c, across, count,
                    _BLOCK_ROWS, COLUMNS, 1,
                )  # fmt: skip
            if whole < b:
                outer_products(
                    out, at + whole, b, wide_flat, ZERO, 1, wide.shape[1], X_flat, left * across + whole, across, count,
                    _BLOCK_ROWS, SMALL_GROUP, 1,
                )  # fmt: skip
            if rows < _BLOCK_ROWS:
                for e in range(rows * b):
                    Y_flat[i * b + e] += sums[e]


@njit(cache=True, nogil=True)
def along_columns(W: Any, stride: int, m: int, left: int, right: int, X: Any, Y: Any) -> None:
    """Y[c, j] = Σ_i X_i[c]·W[i, j] for columns [left, right) of the matrix W of m rows, and all c that Y has.

    X (m, lines, COLUMNS), Y (b, n); b a multiple of SMALL_GROUP. Of ACROSS columns of W _DEPTH rows are widened at a
    time and read from the second cache; reads and writes Y's part once for them.
    """
    b, n, across = Y.shape[0], Y.shape[1], X.shape[1] * COLUMNS
    wide, sums = np.zeros((_DEPTH, ACROSS + _APART)), np.empty(SMALL_GROUP * _RUN)
    wide_flat, X_flat, Y_flat = wide.reshape(-1), X.reshape(-1), Y.reshape(-1)
    for c in range(b):
        Y[c, left:right] = 0.0
    for first in range(left, right, ACROSS):
        count = min(ACROSS, right - first)
        for top in range(ZERO, m, _DEPTH):
            rows = min(_DEPTH, m - top)
            for i in range(rows):
                _widen(W, (top + i) * stride + first, count, wide[i])
            for j in range(0, count, _RUN):
                columns = min(_RUN, count - j)
                for c in range(0, b, SMALL_GROUP):
                    if columns == _RUN:
                        out, at, apart = Y_flat, c * n + first + j, n
                    else:
                        sums[:] = 0.0
                        out, at, apart = sums, ZERO, _RUN
                    outer_products(
                        out, at, apart, X_flat, top * across + c, across, 1, wide_flat, j, wide.shape[1], rows,
                        SMALL_GROUP, _LANES, WIDE_VECTORS,
                    )  # fmt: skip
                    if columns < _RUN:
                        for p in range(SMALL_GROUP):
                            for e in range(columns):
                                Y_flat[(c + p) * n + first + j + e] += sums[p * _RUN + e]
