"""The tridiagonal form of a symmetric T that is zero far from its diagonal, as a block Krylov space's is.

One column after the other is brought to two entries by a reflection of WIDTH rows, and what that puts outside of the
band is chased off its end by one reflection for WIDTH rows each (Murata and Horikoshi 1975): 6·WIDTH·m² products of
numbers in m²/(2·WIDTH) reflections, where a full T takes 4/3·m³ FLOPs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .jit import njit
from .simd import _INT64, _broadcast, _fma, _intrinsic, _load, _pointer, _shuffle, _store

# Entries further from the diagonal are zero; so many rows has a reflection.
WIDTH = 8
# Squares beside which 1 is infinite; entries of T are at most 1.
_VANISHED = 1e-290
# Row i of the band holds columns i − _REACH to i + _REACH, which is as far as the chase fills it.
_REACH = 2 * WIDTH - 1
_LANES = 4


@_intrinsic
def _reflect_columns(typing: Any, Y: Any, at: Any, stride: Any, count: Any, v: Any, v_at: Any, beta: Any) -> Any:
    """Y −= β·v·(vᵀY) for WIDTH rows of `count` columns, a multiple of _LANES; v is WIDTH numbers at v_at."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Y_, Y_0, Y_row, n, v_, v_0, beta_ = arguments
        Y_at, v_at = (_pointer(context, builder, kind, array) for kind, array in ((Y, Y_), (v, v_)))
        scale = _broadcast(builder, beta_, _LANES)
        with cgutils.for_range(builder, builder.udiv(n, _INT64(_LANES))) as loop:
            first = builder.add(Y_0, builder.mul(loop.index, _INT64(_LANES)))
            places = [builder.add(first, builder.mul(Y_row, _INT64(i))) for i in range(WIDTH)]
            rows = [_load(builder, Y_at, place, _LANES, Y.dtype) for place in places]
            factors = [
                _broadcast(builder, _load(builder, v_at, builder.add(v_0, _INT64(i)), 1, v.dtype), _LANES)
                for i in range(WIDTH)
            ]
            sums = [builder.fmul(factors[i], rows[i]) for i in range(2)]
            for i in range(2, WIDTH):
                sums[i % 2] = _fma(builder, factors[i], rows[i], sums[i % 2])
            less = builder.fneg(builder.fmul(scale, builder.fadd(*sums)))
            for i in range(WIDTH):
                _store(builder, Y_at, places[i], _fma(builder, factors[i], less, rows[i]), Y.dtype)
        return context.get_dummy_value()

    place = types.int64
    return types.void(Y, place, place, place, v, place, types.float64), generate


@_intrinsic
def _reflect_rows(typing: Any, Y: Any, at: Any, stride: Any, count: Any, v: Any, v_at: Any, beta: Any) -> Any:
    """Y −= β·(Yv)·vᵀ for `count` rows of WIDTH columns; v is WIDTH numbers at v_at."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Y_, Y_0, Y_row, n, v_, v_0, beta_ = arguments
        Y_at, v_at = (_pointer(context, builder, kind, array) for kind, array in ((Y, Y_), (v, v_)))
        other = _load(builder, v_at, v_0, WIDTH, v.dtype)
        scaled = builder.fmul(other, _broadcast(builder, builder.fneg(beta_), WIDTH))
        with cgutils.for_range(builder, n) as loop:
            place = builder.add(Y_0, builder.mul(loop.index, Y_row))
            row = _load(builder, Y_at, place, WIDTH, Y.dtype)
            total = builder.fmul(row, other)
            while total.type.count > 1:
                half = total.type.count // 2
                total = builder.fadd(
                    _shuffle(builder, total, total, list(range(half))),
                    _shuffle(builder, total, total, list(range(half, 2 * half))),
                )
            along = _broadcast(builder, builder.extract_element(total, ir.IntType(32)(0)), WIDTH)
            _store(builder, Y_at, place, _fma(builder, along, scaled, row), Y.dtype)
        return context.get_dummy_value()

    place = types.int64
    return types.void(Y, place, place, place, v, place, types.float64), generate


@njit(cache=True, nogil=True)
def far_from_diagonal(T: Any) -> Any:
    """The Frobenius norm of what T (m×m, symmetric) has more than WIDTH entries from its diagonal."""
    total = 0.0
    for i in range(len(T)):
        for j in range(i - WIDTH):
            total += T[i, j] ** 2
    return math.sqrt(2.0 * total)


@njit(cache=True, nogil=True)
def reflections(m: int) -> int:
    """How many `tridiagonal_of_band` takes."""
    count = 0
    for k in range(m - 2):
        count += _of_column(m, k)
    return count


@njit(cache=True, nogil=True)
def _of_column(m: int, k: int) -> int:
    return (m - 2 - k + WIDTH - 1) // WIDTH


@njit(cache=True, nogil=True)
def tridiagonal_of_band(T: Any, d: Any, e: Any, v: Any, betas: Any, g: Any) -> None:
    """D = HᵀTH of T's band (m×m, float64, entries of at most 1), and g (m, c), which becomes Hᵀg.

    d (m), e (m, its last zero): D's. v (`reflections`, WIDTH), betas: I − β_k·v_k·v_kᵀ on the rows that it is for; H is
    their product, in that order. T is only read.
    """
    m, c = g.shape
    stride = 2 * _REACH
    # With rows of zeros behind, so that all reflections are alike. T's (i, j) is at i·stride + j + _REACH.
    band = np.zeros((m + 3 * WIDTH) * (stride + 1))
    for i in range(m):
        for j in range(max(0, i - WIDTH), min(m, i + WIDTH + 1)):
            band[i * stride + j + _REACH] = T[i, j]
    wide = (c + _LANES - 1) // _LANES * _LANES
    rows = np.zeros((m + WIDTH, wide))
    for i in range(m):
        for one in range(c):
            rows[i, one] = g[i, one]
    rows_flat, v_flat = rows.reshape(-1), v.reshape(-1)
    n = 0
    for k in range(m - 2):
        column = k
        for start in range(k + 1, m - 1, WIDTH):
            at = start * stride + column + _REACH
            betas[n] = _reflection(band, at, stride, v[n])
            if betas[n] != 0.0:
                # What is left of the diagonal block has this column, too, and zeros before it in the first step.
                corner = start * stride + start + _REACH
                _reflect_columns(band, corner - WIDTH, stride, 3 * WIDTH, v_flat, n * WIDTH, betas[n])
                top = max(0, start - WIDTH)
                _reflect_rows(
                    band, top * stride + start + _REACH, stride, start + 2 * WIDTH - top, v_flat, n * WIDTH, betas[n]
                )
                _reflect_columns(rows_flat, start * wide, wide, wide, v_flat, n * WIDTH, betas[n])
            n += 1
            column = start
    for k in range(m):
        d[k] = band[k * stride + k + _REACH]
        e[k] = band[(k + 1) * stride + k + _REACH] if k < m - 1 else 0.0
        for one in range(c):
            g[k, one] = rows[k, one]


@njit(cache=True, nogil=True)
def _reflection(band: Any, at: int, stride: int, v: Any) -> Any:
    """β and v (WIDTH) of the reflection that leaves a single entry of a column's WIDTH from `at` on."""
    rest = 0.0
    for i in range(WIDTH):
        v[i] = band[at + i * stride]
        if i:
            rest += v[i] ** 2
    beta, stays = reflection(v[0], rest)
    v[0] -= stays
    return beta


@njit(cache=True, nogil=True)
def reflection(first: float, rest: float) -> Any:
    """β and what stays of a vector under I − βvvᵀ, v the vector less that in its first entry.

    first: the vector's first entry; rest: the squares of the others, which become zero.
    """
    if rest < _VANISHED:
        return 0.0, first
    length = math.sqrt(rest + first**2)
    stays = -length if first > 0.0 else length
    return 2.0 / (rest + (first - stays) ** 2), stays


@njit(cache=True, nogil=True)
def turn_back_from_band(v: Any, betas: Any, vectors: Any) -> None:
    """Eigenvectors of D, rows (c×m), become those of T in place: times Hᵀ, where D = HᵀTH."""
    count, m = vectors.shape
    wide = (count + _LANES - 1) // _LANES * _LANES
    turned = np.zeros((m + WIDTH, wide))
    for one in range(count):
        for i in range(m):
            turned[i, one] = vectors[one, i]
    flat, v_flat, n = turned.reshape(-1), v.reshape(-1), len(betas)
    for k in range(m - 3, -1, -1):
        for step in range(_of_column(m, k) - 1, -1, -1):
            n -= 1
            if betas[n] != 0.0:
                _reflect_columns(flat, (k + 1 + step * WIDTH) * wide, wide, wide, v_flat, n * WIDTH, betas[n])
    for one in range(count):
        for i in range(m):
            vectors[one, i] = turned[i, one]
