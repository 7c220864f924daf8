"""Several steps of a block Krylov space in one compiled call: between small passes, calls would take longer than sums.

The call holds no lock, so that several matrices run side by side; of a larger W helpers share a pass, and of a larger
basis a projection.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .copies import copy_row, copy_rows
from .gram import column_tiles, row_strips
from .jit import njit
from .orthonormal import PASS, help_project, make_orthonormal
from .outside import definite
from .team import WHAT, close, open_round, part_done, take_part, wait_for_part, wait_until_done
from .widened import COLUMNS


@njit(cache=True, nogil=True)
def expand(
    W: Any, layout: Any, work: Any, rows: Any, T: Any, held: Any, space: Any, block: Any, begun: Any, leaving: Any,
    size: int, passes: int, limits: Any, stops: Any, job: Any, raw: bool,
) -> Any:  # fmt: skip
    """Take `passes` blocks into the basis, one pass over W each; stop where a block has no new direction.

    W, layout, work: `FusedGramReader`'s. rows (m', n), T (m', m'): the basis and QMQᵀ, of which `size` rows are in use,
    and there is room. held (s, n): what the space is kept orthogonal to. space: `make_orthonormal`'s work. block
    (b, n): the next block, replaced; raw: whether it has to be made orthonormal first, the β of which replaces begun
    (b, b). leaving (b, b): replaced by β of the last step. limits: `orthonormal_against`'s vanished, spread, long.
    stops (passes or 0, 2): after the i-th pass of the call, end it where λ_max(T) is below the first number of row i,
    or not below the second. job: a new one of team.py's; `assist` helps.

    Returns how many steps were taken, whether the last one is whole, and whether a stop ended them. Where it is not
    whole, block is MX itself, not yet orthonormal.
    """
    b = len(block)
    X, shares = space[0], len(work[2])
    taken, whole, stopped = 0, True, False
    if raw:
        X[:] = 0
        copy_rows(block, X[:b])
        copy_rows(np.eye(b), begun)
        whole = make_orthonormal(rows[:0], held, space, begun, np.zeros((0, b)), limits, job, shares)
        if not whole:
            close(job)
            return taken, whole, stopped
        copy_rows(X, block)
    while taken < passes and not stopped:
        first, last = size, size + b
        copy_rows(block, rows[first:last])
        size = last
        multiply(W, layout, work, block, X, job)
        along = np.zeros((last, b))
        leaving[:] = 0.0
        for c in range(b):
            leaving[c, c] = 1.0
            copy_row(X[c], block[c])
        taken += 1
        whole = make_orthonormal(rows[:last], held, space, leaving, along, limits, job, shares)
        if not whole:
            break
        copy_rows(X, block)
        for i in range(last):
            for c in range(b):
                T[i, first + c] = T[first + c, i] = along[i, c]
        for i in range(b):
            for c in range(b):
                T[first + i, first + c] = (along[first + i, c] + along[first + c, i]) / 2
        if len(stops):
            stopped = _below(T, size, stops[taken - 1, 0]) or not _below(T, size, stops[taken - 1, 1])
    close(job)
    return taken, whole, stopped


@njit(cache=True, nogil=True)
def assist(W: Any, layout: Any, work: Any, rows: Any, held: Any, space: Any, job: Any) -> None:
    """Help the thread in `expand` with its passes over W and its projections until it has ended."""
    shares = len(work[2])
    while True:
        part = wait_for_part(job)
        if part < 0:
            return
        if job[WHAT] == PASS:
            _read(W, layout, work, part % shares)
        else:
            help_project(rows, held, space, job, part % shares, shares)
        part_done(job)


@njit(cache=True, nogil=True)
def multiply(W: Any, layout: Any, work: Any, block: Any, X: Any, job: Any) -> None:
    """X (b rounded up, n) = block · WᵀW, by all threads of the job, to the same bits for any number of them."""
    given, _, twice = work
    b, by_rows = len(block), layout[0] == 1
    _give(block, given, by_rows)
    job[WHAT] = PASS
    open_round(job, len(twice))
    while True:
        part = take_part(job)
        if part < 0:
            break
        _read(W, layout, work, part % len(twice))
        part_done(job)
    wait_until_done(job)
    X[:] = 0
    for slot in range(len(twice)):
        for c in range(b):
            for j in range(X.shape[1]):
                X[c, j] += twice[slot, c, j] if by_rows else twice[slot, j, c]


@njit(cache=True, nogil=True)
def _give(block: Any, given: Any, by_rows: bool) -> None:
    """The block's rows where a pass takes them from, as gram.py has it."""
    if given.ndim == 3:
        for c in range(len(block)):
            for j in range(block.shape[1]):
                given[j, c // COLUMNS, c % COLUMNS] = block[c, j]
    elif by_rows:
        copy_rows(block, given[: len(block), : block.shape[1]])
    else:
        for c in range(len(block)):
            for j in range(block.shape[1]):
                given[j, c] = block[c, j]


@njit(cache=True, nogil=True)
def _read(W: Any, layout: Any, work: Any, slot: int) -> None:
    by_rows, stride, m, n, step, parts, parts_a_slot = layout
    given, once, twice = work
    first = slot * parts_a_slot
    last = min(first + parts_a_slot, parts)
    if by_rows == 1:
        row_strips(W, stride, m, n, given, once, once, twice[slot], step, first, last)
    else:
        column_tiles(W, stride, m, n, given, once, once, twice[slot], step, first, last)


@njit(cache=True, nogil=True)
def _below(T: Any, size: int, bound: float) -> bool:
    """Whether λ_max of T's first rows and columns is below the bound: bound·I − T has a Cholesky factorization."""
    if not 0.0 < bound < np.inf:
        return bound > 0.0
    form = np.empty((size, size))
    for i in range(size):
        for j in range(i + 1):
            form[i, j] = (bound if i == j else 0.0) - T[i, j]
    return bool(definite(form))
