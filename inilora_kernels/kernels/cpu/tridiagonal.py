"""The tridiagonal form of a full symmetric matrix, and the reflections that make it (Parlett 1980, chapter 7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .band import reflection
from .gram import BLOCK, add_outer_products
from .jit import ZERO, njit
from .plain_products import SUMS

# Reflections that T is updated with at a time.
_HELD_BACK = 8


@njit(cache=True, nogil=True)
def tridiagonal(T: Any, d: Any, e: Any, betas: Any) -> None:
    """D of T (m×m, symmetric), in place: d (m), e (m, its last zero); row k of T becomes v_k of I − β_k·v_k·v_kᵀ.

    A reflection takes v_k·w_kᵀ + w_k·v_kᵀ from what is left of T, eight of them at a time. Reads its upper triangle
    once a reflection and writes it once for eight: 4/3·m³ FLOPs in all.
    """
    m = len(T)
    p, signed = np.zeros(m), np.empty((2 * _HELD_BACK, BLOCK))
    # v and w, one after the other, of the reflections that T has yet to be updated with.
    held = np.empty((2 * _HELD_BACK, m))
    for start in range(0, m, _HELD_BACK):
        stop = min(start + _HELD_BACK, m)
        held[:] = 0.0
        for k in range(start, stop):
            before = 2 * (k - start)
            for i in range(0, before, 2):
                less(T[k, k:], held[i, k], held[i + 1, k:])
                less(T[k, k:], held[i + 1, k], held[i, k:])
            d[k] = T[k, k]
            if k == m - 1:
                break
            x, product = T[k, k + 1 :], p[k + 1 :]
            betas[k], e[k] = _reflection(x)
            product[:] = 0.0
            _add_product(T, k + 1, x, product)
            for i in range(0, before, 2):
                v, w = held[i, k + 1 :], held[i + 1, k + 1 :]
                along_v, along_w = dot(v, x), dot(w, x)
                less(product, along_w, v)
                less(product, along_v, w)
            beta = betas[k]
            half = 0.5 * beta * beta * dot(product, x)
            for i in range(m - k - 1):
                held[before, k + 1 + i] = x[i]
                held[before + 1, k + 1 + i] = beta * product[i] - half * x[i]
        whole = stop + (m - stop) // BLOCK * BLOCK
        for i in range(stop, whole, BLOCK):
            for n in range(2 * _HELD_BACK):
                for c in range(BLOCK):
                    signed[n, c] = -held[n ^ 1, i + c]
            add_outer_products(
                held.reshape(-1), m, ZERO, 2 * _HELD_BACK, i, m - i, signed, T[i : i + BLOCK], ZERO
            )  # fmt: skip
        for i in range(whole, m):
            for n in range(2 * _HELD_BACK):
                less(T[i, i:], held[n ^ 1, i], held[n, i:])
    e[m - 1] = betas[m - 1] = 0.0


@njit(cache=True, nogil=True)
def _add_product(T: Any, first: int, x: Any, out: Any) -> None:
    """out += the part of T from row and column `first` on, times x: of the upper triangle, four rows at a time."""
    m = len(x)
    for i in range(0, m, 4):
        last = min(i + 4, m)
        for a in range(i, last):
            for c in range(a, last):
                entry = T[first + a, first + c]
                out[a] += entry * x[c]
                if c > a:
                    out[c] += entry * x[a]
        if last < m:
            row, rest = first + i, first + last
            sums = _four_products(
                T[row, rest:], T[row + 1, rest:], T[row + 2, rest:], T[row + 3, rest:], x[i:last], x[last:], out[last:]
            )  # fmt: skip
            for a in range(4):
                out[i + a] += sums[a]


@njit(cache=True, nogil=True, fastmath=SUMS)
def _four_products(one: Any, two: Any, three: Any, four: Any, first: Any, x: Any, p: Any) -> Any:
    """Each row times x; and to p is added what they, as columns, give: Σ first_i·row_i."""
    a = b = c = d = 0.0
    w, y, z, u = first[0], first[1], first[2], first[3]
    for j in range(len(x)):
        a += one[j] * x[j]
        b += two[j] * x[j]
        c += three[j] * x[j]
        d += four[j] * x[j]
        p[j] += one[j] * w + two[j] * y + three[j] * z + four[j] * u
    return a, b, c, d


@njit(cache=True, nogil=True)
def _reflection(x: Any) -> Any:
    """β and what stays of x under I − βvvᵀ, which makes all but its first entry zero; x becomes v."""
    beta, stays = reflection(x[0], dot(x[1:], x[1:]))
    x[0] -= stays
    return beta, stays


@njit(cache=True, nogil=True, fastmath=SUMS)
def dot(x: Any, y: Any) -> Any:
    """xᵀy."""
    total = 0.0
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@njit(cache=True, nogil=True, fastmath=SUMS)
def less(x: Any, factor: float, y: Any) -> None:
    """x less factor·y, in place."""
    for j in range(len(x)):
        x[j] -= factor * y[j]


@njit(cache=True, nogil=True)
def times_reflections(rows: Any, T: Any, betas: Any) -> None:
    """rows (c×m) times H, in place. T, betas: as `tridiagonal` leaves them."""
    for k in range(len(T) - 1):
        if betas[k] != 0.0:
            for c in range(len(rows)):
                y = rows[c, k + 1 :]
                less(y, betas[k] * dot(T[k, k + 1 :], y), T[k, k + 1 :])


@njit(cache=True, nogil=True)
def turn_back_from_full(form: Any, betas: Any, vectors: Any) -> None:
    """Eigenvectors of D, rows (c×m), become those of T in place: times Hᵀ. Reads half of form once.

    form, betas: T and β as `tridiagonal` leaves them.
    """
    for k in range(len(form) - 2, -1, -1):
        if betas[k] != 0.0:
            for one in range(len(vectors)):
                y = vectors[one, k + 1 :]
                less(y, betas[k] * dot(form[k, k + 1 :], y), form[k, k + 1 :])
