"""||W − BA||_F² of every matrix of a wave, from the residual itself, in one launch."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    STRIP_A_OFFSET,
    STRIP_B_OFFSET,
    STRIP_B_STRIDE,
    STRIP_FIELDS,
    STRIP_FIRST_COLUMN,
    STRIP_LAST_COLUMN,
    STRIP_RANK,
    STRIP_ROWS,
    STRIP_STRIDE,
    STRIP_W_OFFSET,
)

ROWS, COLUMNS, WARPS = 64, 64, 4


@triton.jit
def loss_kernel(
    weights, factors, losses, strips, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Σ (W − BA)² over one strip program's rows and columns, to losses[program], float64.

    A program goes over its part in tiles of ROWS×COLUMNS: it forms the tile's residual, rank by rank, and adds the
    squares to sums of its own for each entry of the tile. Reads W once, A's columns once for each ROWS rows, B's rows
    once for each COLUMNS columns; writes 8 bytes. FLOPs: 2·r + 8 an entry.

    WIDE: residual and sums in float64. Otherwise the residual is float32, each of its entries within
    (r + 1)·2⁻²⁴·(|W| + |B||A|), and its squares are added with their rounding errors carried along (Knuth's two-sum),
    so that the sum itself is as good as float64's. By Cauchy–Schwarz the loss f then errs by at most 2·√f·δ + δ², where
    δ is the Frobenius norm of those bounds; the errors' signs being mixed, by far less.
    """
    program = tl.program_id(0)
    work = strips + program * STRIP_FIELDS
    W_offset = tl.multiple_of(tl.load(work + STRIP_W_OFFSET), 16)
    stride = tl.multiple_of(tl.load(work + STRIP_STRIDE).to(tl.int32), 16)
    rows = tl.load(work + STRIP_ROWS).to(tl.int32)
    first_column = tl.multiple_of(tl.load(work + STRIP_FIRST_COLUMN).to(tl.int32), 16)
    last_column = tl.multiple_of(tl.load(work + STRIP_LAST_COLUMN).to(tl.int32), 16)
    A_offset = tl.multiple_of(tl.load(work + STRIP_A_OFFSET), 16)
    B_offset = tl.multiple_of(tl.load(work + STRIP_B_OFFSET), 16)
    B_stride = tl.multiple_of(tl.load(work + STRIP_B_STRIDE).to(tl.int32), 16)
    rank = tl.load(work + STRIP_RANK).to(tl.int32)
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.full((ROWS, COLUMNS), 0.0, DTYPE)
    lost = tl.full((ROWS, COLUMNS), 0.0, DTYPE)
    for first_row in range(0, rows, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside_rows = row < rows
        for start in range(first_column, last_column, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside_columns = column < last_column
            inside = inside_rows[:, None] & inside_columns[None, :]
            # The rows of a strip are at most 256, so that row · stride stays an int32.
            W_tile = tl.load(weights + W_offset + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
            residual = W_tile.to(tl.float32).to(DTYPE)
            for p in range(rank):
                b = tl.load(factors + B_offset + p * B_stride + row, mask=inside_rows, other=0.0)
                a = tl.load(factors + A_offset + p * stride + column, mask=inside_columns, other=0.0)
                residual -= b.to(DTYPE)[:, None] * a.to(DTYPE)[None, :]
            square = residual * residual
            if WIDE:
                total += square
            else:
                grown = total + square
                back = grown - total
                lost += (total - (grown - back)) + (square - back)
                total = grown
    sums = total.to(tl.float64) + lost.to(tl.float64)
    tl.store(losses + program, tl.sum(tl.sum(sums, axis=1), axis=0))
