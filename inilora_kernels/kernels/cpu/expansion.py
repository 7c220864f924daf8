"""Several steps of a block Krylov space in one compiled call, for a W so small that calls would take longer than sums.

The call holds no lock, so that several matrices run side by side, each on one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .gram import column_tiles, row_strips
from .jit import njit
from .orthonormal import make_orthonormal


@njit(cache=True, nogil=True)
def expand(
    W: Any, layout: Any, work: Any, rows: Any, T: Any, held: Any, block: Any, leaving: Any,
    size: int, passes: int, limits: Any,
) -> Any:  # fmt: skip
    """Take `passes` blocks into the basis, one pass over W each; stop where a block has no new direction.

    W, layout, work: `FusedGramReader`'s. rows (m', n), T (m', m'): the basis and QMQᵀ, of which `size` rows are in use,
    and there is room. held (s, n): what the space is kept orthogonal to. block (b, n): the next block, replaced;
    leaving (b, b): replaced by β of the last step. limits: `orthonormal_against`'s vanished, spread, long.

    Returns how many steps were taken, and whether the last one is whole. Where it is not, block is MX itself, not yet
    orthonormal.
    """
    b, n = block.shape
    by_rows = layout[0] == 1
    X = np.zeros((work[1].shape[1] if by_rows else work[1].shape[0], n), dtype=np.float32)
    for taken in range(passes):
        first, last = size, size + b
        rows[first:last] = block
        size = last
        _multiply(W, layout, work, block, X)
        along = np.zeros((last, b))
        leaving[:] = 0.0
        for c in range(b):
            leaving[c, c] = 1.0
            block[c] = X[c]
        if not make_orthonormal(rows[:last], held, X, leaving, along, limits[0], limits[1], limits[2]):
            return taken + 1, False
        block[:] = X[:b]
        for i in range(last):
            for c in range(b):
                T[i, first + c] = T[first + c, i] = along[i, c]
        for i in range(b):
            for c in range(b):
                T[first + i, first + c] = (along[first + i, c] + along[first + c, i]) / 2
    return passes, True


@njit(cache=True, nogil=True)
def _multiply(W: Any, layout: Any, work: Any, block: Any, X: Any) -> None:
    """X (b rounded up, n) = block · WᵀW: `FusedGramReader` on one thread, to the same bits."""
    by_rows, stride, m, n, step, parts, parts_a_slot = layout
    given, once, twice = work
    b = len(block)
    for c in range(b):
        for j in range(block.shape[1]):
            if by_rows == 1:
                given[c, j] = block[c, j]
            else:
                given[j, c] = block[c, j]
    for slot in range(len(twice)):
        first = slot * parts_a_slot
        last = min(first + parts_a_slot, parts)
        if by_rows == 1:
            row_strips(W, stride, m, n, given, once, twice[slot], step, first, last)
        else:
            column_tiles(W, stride, m, n, given, once, twice[slot], step, first, last)
    X[:] = 0
    for slot in range(len(twice)):
        for c in range(b):
            for j in range(X.shape[1]):
                X[c, j] += twice[slot, c, j] if by_rows == 1 else twice[slot, j, c]
