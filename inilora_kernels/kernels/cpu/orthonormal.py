"""A block of vectors made orthonormal, and orthogonal to a basis: one compiled call where torch takes forty small ones.

Rows are vectors, float32; sums that decide on the result, those within the block, are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .copies import copy_rows
from .gram import BLOCK, RUN, add_inner_products, add_outer_by_strips
from .in_place import WIDE_ROWS
from .jit import ZERO, njit
from .plain_products import SUMS
from .team import WHAT, job, open_round, part_done, take_part, wait_until_done

# From all rows: one as a rule, a second where much of a row was along rows other than the last.
_MOST_PROJECTIONS = 3
# What an open round of `expand`'s job is: a pass over W, or one of the two products of a projection from rows of the
# basis, or of those that are held fixed; and from how many entries of them on these are shared.
PASS, INNER, OUTER = ZERO, ZERO + 1, ZERO + 2
_BASIS, _HELD = ZERO, ZERO + 1
_SHARED_ENTRIES = 1 << 17


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
    along, coupling = np.zeros((len(Q), b)), np.eye(b)
    held = Q[:0] if fixed is None else fixed
    work = projection_space(b, max(len(Q), len(held)), n)
    X = torch.from_numpy(work[0])
    X[:b] = Z
    limits = vanished, spread, long
    if not make_orthonormal(Q.numpy(), held.numpy(), work, coupling, along, limits, job(), 1):
        return None
    return X[:b], torch.from_numpy(coupling), torch.from_numpy(along)


@njit(cache=True, nogil=True)
def projection_space(b: int, most: int, n: int) -> Any:
    """X of b rows, rounded up, and as wide parts of at most so many rows: `make_orthonormal`'s work."""
    width = (b + BLOCK - 1) // BLOCK * BLOCK
    return np.zeros((width, n), dtype=np.float32), np.empty((most, width), dtype=np.float32)


@njit(cache=True, nogil=True)
def make_orthonormal(
    Q: Any, fixed: Any, work: Any, coupling: Any, along: Any, limits: Any, job: Any, shares: int
) -> bool:  # fmt: skip
    """X (b rounded up, n) in place, coupling (b, b) from the identity and along (m, b) from zero.

    work: `projection_space`'s, for as many rows as Q or `fixed` has. limits: vanished, spread, long. job: one of
    team.py's, to whose rounds of `shares` parts helpers come. Reads Q and `fixed` twice for each projection from all
    rows, one as a rule, and X a few times from the cache.
    """
    X, _ = work
    vanished, spread, long = limits
    b, n = len(coupling), X.shape[1]
    parts = work[1]
    wide, gram, triangle = np.empty((b, n)), np.empty((b, b)), np.zeros((b, b))
    gram_of(X, gram)
    lengths = np.sqrt(np.diag(gram))
    for attempt in range(1 + _MOST_PROJECTIONS):
        first = max(0, len(Q) - 2 * b) if attempt == 0 else 0
        if attempt and len(fixed):
            _project(fixed, _HELD, ZERO, work, job, shares)
        if first < len(Q):
            _project(Q, _BASIS, first, work, job, shares)
            for i in range(first, len(Q)):
                for c in range(b):
                    for e in range(b):
                        along[i, e] -= parts[i - first, c] * coupling[c, e]
        gram_of(X, gram)
        stayed_long = True
        for c in range(b):
            if not gram[c, c] > (vanished * lengths[c]) ** 2:
                return False
            stayed_long = stayed_long and gram[c, c] > long**2
        if not cholesky(gram, triangle, spread):
            return False
        solve(triangle, X, wide)
        copy_rows(_product(triangle, coupling), coupling)
        if attempt and stayed_long:
            return True
        # What rounding is to Z, it is to these unit rows, as long as the triangle is no smaller than that.
        for c in range(b):
            shrunk = np.sqrt(gram[c, c]) / lengths[c]
            lengths[c] = 1.0 / min(1.0, shrunk) if attempt == 0 else 1.0
    return False


@njit(cache=True, nogil=True)
def _project(Q: Any, which: int, first: int, work: Any, job: Any, shares: int) -> None:
    """parts = −QXᵀ and X += partsᵀQ: the components of X's rows along Q's rows from `first` on are removed."""
    m, n = Q.shape
    if shares == 1 or (m - first) * n < _SHARED_ENTRIES:
        project_part(Q, first, m, work, INNER, ZERO, ZERO + 1)
        project_part(Q, first, m, work, OUTER, ZERO, ZERO + 1)
        return
    for product in (INNER, OUTER):
        job[WHAT], job[WHAT + 1], job[WHAT + 2], job[WHAT + 3] = product, which, first, m
        open_round(job, shares)
        while True:
            part = take_part(job)
            if part < 0:
                break
            project_part(Q, first, m, work, product, part % shares, shares)
            part_done(job)
        wait_until_done(job)


@njit(cache=True, nogil=True)
def help_project(Q: Any, held: Any, work: Any, job: Any, part: int, shares: int) -> None:
    """A helper's part of the projection that is the job's open round."""
    product, which, first, last = job[WHAT], job[WHAT + 1], job[WHAT + 2], job[WHAT + 3]
    project_part(held if which == _HELD else Q, first, last, work, product, part, shares)


@njit(cache=True, nogil=True)
def project_part(Q: Any, first: int, last: int, work: Any, product: int, part: int, shares: int) -> None:
    """One of the parts, in whole blocks of registers: of the rows [first, last) of Q for parts, of X's columns for X.

    So its bits do not depend on how many parts there are.
    """
    X, parts = work
    n, m = Q.shape[1], last - first
    flat = Q.reshape(-1)[first * n :]
    if product == INNER:
        step = (m + shares * WIDE_ROWS - 1) // (shares * WIDE_ROWS) * WIDE_ROWS
        top, bottom = part * step, min((part + 1) * step, m)
        if top < bottom:
            parts[top:bottom] = 0
            add_inner_products(flat, n, top, bottom, ZERO, n, X, parts, WIDE_ROWS * n)
            for i in range(top, bottom):
                for c in range(len(X)):
                    parts[i, c] = -parts[i, c]
    else:
        step = (n + shares * RUN - 1) // (shares * RUN) * RUN
        left = part * step
        if left < n:
            add_outer_by_strips(flat, n, m, left, min(step, n - left), parts, X)


@njit(cache=True, nogil=True, fastmath=SUMS)
def gram_of(X: Any, gram: Any) -> None:
    """XXᵀ of the first rows, as many as gram has, in float64."""
    for c in range(len(gram)):
        for e in range(c + 1):
            total = 0.0
            x, y = X[c], X[e]
            for j in range(len(x)):
                total += np.float64(x[j]) * np.float64(y[j])
            gram[c, e] = gram[e, c] = total


@njit(cache=True, nogil=True)
def cholesky(gram: Any, triangle: Any, spread: float) -> bool:
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
def solve(triangle: Any, X: Any, wide: Any) -> None:
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
