"""Eigenvalues of a symmetric matrix, a few rows times all its eigenvectors, and the vectors of the largest values.

This is what a Krylov space needs of its T = QMQᵀ. LAPACK's routine finds all eigenvectors whole and cannot be called
from compiled code, which holds no lock. Everything is float64: T = HDHᵀ with D tridiagonal and H a product of
reflections, band.py's where T is zero far from its diagonal and tridiagonal.py's elsewhere, then implicit QL steps on
D, and inverse iteration for single vectors of D (Parlett 1980, chapters 8 and 4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .band import WIDTH, far_from_diagonal, reflections, tridiagonal_of_band, turn_back_from_band
from .copies import copy_row, copy_rows
from .jit import njit
from .tridiagonal import dot, less, times_reflections, tridiagonal, turn_back_from_full

_UNIT = 2.0**-53
# QL takes less than two steps a value; after so many it is given up.
_MOST_STEPS = 40
# Vectors of values this close, as a share of |D|, are made orthogonal.
_CLOSE = 1e-3
_MOST_INVERSE_STEPS = 5
# Far from its diagonal a space's T has rounding, in norm up to so many units times √m of its largest entry: 0.3 to 1.8
# were seen.
_ROUNDINGS = 2.0
# A vector counts if what D makes of it is its value's multiple to so many roundings of |D|.
_ACCURATE = 256


@njit(cache=True, nogil=True)
def by_ql(d: Any, e: Any, E: Any) -> bool:
    """The eigenvalues of D in d, unordered, and E's columns times its eigenvectors; e is used up.

    d (m), e (m, its last zero), E (m, c). False where it does not converge.
    """
    m = len(d)
    # What is below D's own rounding is nothing.
    least = 0.0
    for i in range(m):
        least = max(least, _UNIT * (abs(d[i]) + abs(e[i])))
    for low in range(m):
        for step in range(_MOST_STEPS + 1):
            high = low
            while high < m - 1 and abs(e[high]) > least:
                high += 1
            if high == low:
                break
            if step == _MOST_STEPS:
                return False
            # Wilkinson's shift: the eigenvalue of the first 2×2 block that is nearer to its first entry.
            g = (d[low + 1] - d[low]) / (2.0 * e[low])
            r = np.sqrt(g * g + 1.0)
            g = d[high] - d[low] + e[low] / (g + (r if g >= 0.0 else -r))
            s, c, p = 1.0, 1.0, 0.0
            whole = True
            for i in range(high - 1, low - 1, -1):
                f, b = s * e[i], c * e[i]
                r = np.sqrt(f * f + g * g)
                e[i + 1] = r
                if r == 0.0:
                    d[i + 1] -= p
                    e[high] = 0.0
                    whole = False
                    break
                s, c = f / r, g / r
                g = d[i + 1] - p
                r = (d[i] - g) * s + 2.0 * c * b
                p = s * r
                d[i + 1] = g + p
                g = c * r - b
                for column in range(E.shape[1]):
                    f = E[i + 1, column]
                    E[i + 1, column] = s * E[i, column] + c * f
                    E[i, column] = c * E[i, column] - s * f
            if whole:
                d[low] -= p
                e[low] = g
                e[high] = 0.0
    return True


@njit(cache=True, nogil=True)
def leading_vectors(reduced: Any, values: Any, vectors: Any) -> bool:
    """The eigenvectors of D of T's largest values, as the rows of `vectors` (count, m), by inverse iteration.

    reduced, values: `decomposed`'s. False where one is not accurate. `turn_back` makes them T's.
    """
    _, _, d, e, scale, _ = reduced
    theta = values / scale
    count, m = vectors.shape
    size = max(abs(theta[0]), abs(theta[m - 1]))
    if not size > 0.0:
        return False
    upper, second, third, factor = np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    swapped = np.empty(m, dtype=np.bool_)
    start = np.empty(m)
    state = np.uint64(1)
    first = 0
    value = np.inf
    for one in range(count):
        if one and theta[one - 1] - theta[one] > _CLOSE * size:
            first = one
        # Of equal values each gets a place of its own, so that the iterations differ.
        value = min(theta[one], value - 8 * _UNIT * size) if one > first else theta[one]
        _factor(d, e, value, size, upper, second, third, factor, swapped)
        y = vectors[one]
        for i in range(m):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            start[i] = np.float64(state >> np.uint64(40)) * 2.0**-24 - 0.5
        copy_row(start, y)
        accurate = False
        for step in range(_MOST_INVERSE_STEPS):
            _solve(upper, second, third, factor, swapped, y, step > 0)
            for earlier in range(first, one):
                less(y, dot(vectors[earlier], y), vectors[earlier])
            length = np.sqrt(dot(y, y))
            if not 0.0 < length < np.inf:
                return False
            for i in range(m):
                y[i] /= length
            accurate = _left(d, e, theta[one], y) <= _ACCURATE * _UNIT * size * np.sqrt(m)
            if accurate and step > 0:
                break
        if not accurate:
            return False
    return True


@njit(cache=True, nogil=True)
def turn_back(reduced: Any, vectors: Any) -> None:
    """Eigenvectors of D, rows (c×m), become those of T in place: times Hᵀ. Reads the reflections once."""
    form, betas, _, _, _, banded = reduced
    if banded:
        turn_back_from_band(form, betas, vectors)
    else:
        turn_back_from_full(form, betas, vectors)


@njit(cache=True, nogil=True)
def _factor(
    d: Any, e: Any, value: float, size: float, upper: Any, second: Any, third: Any, factor: Any, swapped: Any
) -> None:
    """D − value·I = P·L·U by elimination with row exchanges; U has three diagonals."""
    m = len(d)
    least = _UNIT * size
    here, right = d[0] - value, e[0]
    for i in range(m - 1):
        below, middle, far = e[i], d[i + 1] - value, e[i + 1]
        swapped[i] = abs(below) > abs(here)
        if swapped[i]:
            upper[i], second[i], third[i] = below, middle, far
            factor[i] = here / below
            here, right = right - factor[i] * middle, -factor[i] * far
        else:
            if abs(here) < least:
                here = least
            upper[i], second[i], third[i] = here, right, 0.0
            factor[i] = below / here
            here, right = middle - factor[i] * right, far
    upper[m - 1] = here if abs(here) > least else least


@njit(cache=True, nogil=True)
def _solve(upper: Any, second: Any, third: Any, factor: Any, swapped: Any, y: Any, forward: bool) -> None:
    """y = (D − value·I)⁻¹y; without `forward`, of another y, of which this is L⁻¹y."""
    m = len(y)
    if forward:
        for i in range(m - 1):
            if swapped[i]:
                y[i], y[i + 1] = y[i + 1], y[i] - factor[i] * y[i + 1]
            else:
                y[i + 1] -= factor[i] * y[i]
    y[m - 1] /= upper[m - 1]
    if m > 1:
        y[m - 2] = (y[m - 2] - second[m - 2] * y[m - 1]) / upper[m - 2]
    for i in range(m - 3, -1, -1):
        y[i] = (y[i] - second[i] * y[i + 1] - third[i] * y[i + 2]) / upper[i]


@njit(cache=True, nogil=True)
def _left(d: Any, e: Any, value: float, y: Any) -> Any:
    """|Dy − value·y|."""
    m = len(d)
    total = 0.0
    for i in range(m):
        part = (d[i] - value) * y[i]
        if i:
            part += e[i - 1] * y[i - 1]
        if i < m - 1:
            part += e[i] * y[i + 1]
        total += part * part
    return np.sqrt(total)


@njit(cache=True, nogil=True)
def decomposed(T: Any, rows: Any, unit: float) -> Any:
    """The eigenvalues of T (m×m), and `rows` (c×m) times its eigenvectors.

    unit: of the arithmetic that T comes from, if it is a block Krylov space's, of blocks of up to WIDTH vectors: what
    is far from its diagonal then counts as zero, if it is rounding. 0 for any other T.

    Returns θ (m, descending), g (m×c), whose j-th row belongs to θ_j, what `leading_vectors` takes (the reflections and
    β, d and e, a scale, and whether they are band.py's), and whether QL converged. T is used up, as a large one would
    otherwise be there twice; `rows` are only read.
    """
    m = len(T)
    # Squares of T's entries then stay in range; a power of two rounds nothing.
    largest = 0.0
    for i in range(m):
        for j in range(m):
            largest = max(largest, abs(T[i, j]))
    scale = math.ldexp(1.0, min(1020, math.frexp(largest)[1]))
    T /= scale
    d, e = np.empty(m), np.empty(m)
    banded = far_from_diagonal(T) <= _ROUNDINGS * unit * math.sqrt(m) * (largest / scale)
    if banded:
        form = np.empty((reflections(m), WIDTH))
        betas, g = np.empty(len(form)), np.ascontiguousarray(rows.T)
        tridiagonal_of_band(T, d, e, form, betas, g)
    else:
        form, betas = T, np.empty(m)
        tridiagonal(form, d, e, betas)
        reflected = rows.copy()
        times_reflections(reflected, form, betas)
        g = np.ascontiguousarray(reflected.T)
    values, beside = d.copy(), e.copy()
    if abs(d[0]) > abs(d[m - 1]):
        # QL wants the small entries first.
        values, g = values[::-1].copy(), g[::-1].copy()
        for i in range(m - 1):
            beside[i] = e[m - 2 - i]
    converged = by_ql(values, beside, g)
    _sort(values, g)
    return values * scale, g, (form, betas, d, e, scale, banded), converged


@njit(cache=True, nogil=True)
def _sort(values: Any, g: Any) -> None:
    """Both in place, by falling values; by insertion, since numba would compile its own sort for half a second."""
    for i in range(1, len(values)):
        value, row = values[i], g[i].copy()
        j = i
        while j > 0 and values[j - 1] < value:
            values[j] = values[j - 1]
            copy_row(g[j - 1], g[j])
            j -= 1
        values[j] = value
        copy_row(row, g[j])


@njit(cache=True, nogil=True)
def leading_pairs(T: Any, count: int) -> Any:
    """The eigenvalues of T (m×m), descending, its first `count` eigenvectors as rows, and whether QL converged."""
    values, _, reduced, converged = decomposed(T.copy(), np.empty((0, len(T))), 0.0)
    vectors = np.empty((count, len(T)))
    if leading_vectors(reduced, values, vectors):
        turn_back(reduced, vectors)
    else:
        values, every, _, converged = decomposed(T.copy(), np.eye(len(T)), 0.0)
        copy_rows(every, vectors)
    return values, vectors, converged


@njit(cache=True, nogil=True)
def largest_eigenvalue(T: Any) -> Any:
    """λ_max of T (m×m); NaN where QL does not converge."""
    theta, _, _, converged = decomposed(T.copy(), np.empty((0, len(T))), 0.0)
    return theta[0] if converged else np.nan
