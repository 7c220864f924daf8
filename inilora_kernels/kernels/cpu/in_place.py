"""simd.py's two products on rows of W as they lie in memory, without a copy into panels, in float32 or float64.

out and X are of one dtype, that of the sums; W is of its own. A vector holds LANES sums of float32 and WIDE_LANES of
float64.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .simd import (
    _DOUBLE,
    _FLOAT,
    _INT64,
    _STORED,
    CACHE_LINE,
    GROUP,
    LANES,
    ROWS,
    SMALL_GROUP,
    VECTORS,
    _add_outer_products,
    _fetch,
    _fma,
    _intrinsic,
    _load,
    _pointer,
    _store,
    _sum_lanes,
    _vector_type,
)

# The register blocks of simd.py with SMALL_GROUP columns of X, and as many more rows or vectors of W instead.
WIDE_ROWS = ROWS * GROUP // SMALL_GROUP
WIDE_VECTORS = VECTORS * GROUP // SMALL_GROUP
# As many as the products of SMALL_GROUP columns are summed to; where vectors hold fewer, FILLS_VECTORS is False.
WIDE_LANES = max(LANES // 2, SMALL_GROUP)
FILLS_VECTORS = WIDE_LANES == LANES // 2
# Whether `outer_runs`, which leaves most of a row for later, fetches ahead. With vectors of a cache line a pass over
# tiles of columns takes half the time then (1024×4096, Cascade Lake); with those of half a line, each of which would be
# asked for several times, a pass is a third slower (Zen 3).
FETCHES = LANES * 4 >= CACHE_LINE


@_intrinsic
def outer_runs(
    typing: Any, out: Any, out_start: Any, out_stride: Any, x: Any, x_start: Any, x_stride: Any, W: Any,
    W_start: Any, W_stride: Any, count: Any, ahead: Any, vectors: Any,
) -> Any:  # fmt: skip
    """out[p, :] += Σ_{i<count} x[i, p]·W[i, :] for p < SMALL_GROUP and as many columns as so many vectors hold.

    Row i of out, x and W begins at its start + i·stride. Reads that many elements of count rows of W and, where that is
    faster, has those that lie `ahead` elements further brought into the second cache; reads count·SMALL_GROUP scalars
    of x; reads and writes SMALL_GROUP rows of out. The sums stay in registers over all i. vectors is a compile-time
    constant.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out_, out_0, out_row, x_, x_0, x_i, W_, W_0, W_i, n, beyond, _ = arguments
        given = out_, out_0, out_row, x_, x_0, x_i, _INT64(1), W_, W_0, W_i, n
        block = SMALL_GROUP, _lanes(out), vectors.literal_value
        _add_outer_products(context, builder, (out, x, W), given, block, beyond if FETCHES else None)
        return context.get_dummy_value()

    at = types.int64
    return types.void(out, at, at, x, at, at, W, at, at, at, at, vectors), generate


@_intrinsic
def inner_runs(
    typing: Any, out: Any, out_start: Any, out_stride: Any, W: Any, W_start: Any, W_stride: Any, X: Any,
    X_start: Any, X_stride: Any, runs: Any, ahead: Any,
) -> Any:  # fmt: skip
    """out[i, p] += Σ_j W[i, j]·X[p, j] for i < WIDE_ROWS, p < SMALL_GROUP, over `runs` runs of a vector's columns.

    Row i of out, W and X begins at its start + i·stride. Reads WIDE_ROWS vectors of W a run and has those that lie
    `ahead` elements further brought into the second cache; reads SMALL_GROUP vectors of X a run; reads and writes
    WIDE_ROWS·SMALL_GROUP of out. The sums stay in registers over all runs.
    """
    lanes, wide = _lanes(out), out.dtype == types.float64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out_at, W_at, X_at = (
            _pointer(context, builder, kind, arguments[place]) for kind, place in ((out, 0), (W, 3), (X, 6))
        )
        out_0, out_row, W_0, W_row, X_0, X_row, n, beyond = (arguments[i] for i in (1, 2, 4, 5, 7, 8, 9, 10))
        kind = _vector_type(lanes, _DOUBLE if wide else _FLOAT)
        sums = [[cgutils.alloca_once(builder, kind) for _ in range(SMALL_GROUP)] for _ in range(WIDE_ROWS)]
        zero = ir.Constant(kind, [0.0] * lanes)
        for i in range(WIDE_ROWS):
            for p in range(SMALL_GROUP):
                builder.store(zero, sums[i][p])
        W_rows = [builder.add(W_0, builder.mul(W_row, _INT64(i))) for i in range(WIDE_ROWS)]
        X_rows = [builder.add(X_0, builder.mul(X_row, _INT64(p))) for p in range(SMALL_GROUP)]

        def of_W(i: int, along: Any) -> Any:
            return _load(builder, W_at, builder.add(W_rows[i], along), lanes, W.dtype, wide)

        def of_X(p: int, along: Any) -> Any:
            return _load(builder, X_at, builder.add(X_rows[p], along), lanes, X.dtype)

        def add(i: int, p: int, row: Any, other: Any) -> None:
            builder.store(_fma(builder, row, other, builder.load(sums[i][p])), sums[i][p])

        def add_run(along: Any) -> None:
            # The fewer stay in registers; with one of the others and the sums they fill the register file.
            if WIDE_ROWS < SMALL_GROUP:
                rows = [of_W(i, along) for i in range(WIDE_ROWS)]
                for p in range(SMALL_GROUP):
                    other = of_X(p, along)
                    for i in range(WIDE_ROWS):
                        add(i, p, rows[i], other)
            else:
                others = [of_X(p, along) for p in range(SMALL_GROUP)]
                for i in range(WIDE_ROWS):
                    row = of_W(i, along)
                    for p in range(SMALL_GROUP):
                        add(i, p, row, others[p])

        # As many runs as make a line of W, which is asked for once, as each further time costs as much as a load. The
        # last run may begin another line, where rows begin within one.
        a_line = max(1, CACHE_LINE // (lanes * _STORED[W.dtype][0]))
        whole = builder.udiv(n, _INT64(a_line))
        end = builder.sub(builder.mul(n, _INT64(lanes)), _INT64(1))
        for row in W_rows:
            _fetch(builder, W_at, builder.add(builder.add(row, end), beyond), 1, W.dtype)
        with cgutils.for_range(builder, whole) as loop:
            first = builder.mul(loop.index, _INT64(a_line * lanes))
            for row in W_rows:
                _fetch(builder, W_at, builder.add(builder.add(row, first), beyond), lanes, W.dtype)
            for run in range(a_line):
                add_run(builder.add(first, _INT64(run * lanes)))
        done = builder.mul(whole, _INT64(a_line))
        with cgutils.for_range(builder, builder.sub(n, done)) as loop:
            add_run(builder.mul(builder.add(done, loop.index), _INT64(lanes)))
        for i in range(WIDE_ROWS):
            total = _sum_lanes(builder, [builder.load(sums[i][p]) for p in range(SMALL_GROUP)])
            at = builder.add(out_0, builder.mul(out_row, _INT64(i)))
            before = _load(builder, out_at, at, SMALL_GROUP, out.dtype)
            _store(builder, out_at, at, builder.fadd(before, total), out.dtype)
        return context.get_dummy_value()

    at = types.int64
    return types.void(out, at, at, W, at, at, X, at, at, at, at), generate


def _lanes(out: Any) -> int:
    """How many sums of this array's dtype a vector holds."""
    return WIDE_LANES if out.dtype == types.float64 else LANES
