"""The two GPU kernels of a step. `triton_wave` lays out what they read and write; `plan` chooses their tiles.

All state of a wave lies in a few long buffers, and every program takes one row of a work list: offsets into the buffers,
sizes, and nothing else. So matrices of any shapes share a launch. A factor is stored rank-major for both sides, A as
(r×k) and B as Bᵀ (r×d), its rows padded with zeros to a multiple of 16 elements, which keeps every load 128 bits wide.
No program writes what another program of the same launch reads or writes: there are no atomics, and every run gives the
same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gradient_products_kernel(
    weights,
    factors,
    slots,
    shares,
    grams,
    step,
    strips,
    sums,
    sum_programs,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STRIP_FIELDS: tl.constexpr,
    SUM_FIELDS: tl.constexpr,
):
    """P = BᵀW and Q = WAᵀ for every matrix of the wave, from one read of W; and the Gram matrices AAᵀ, BᵀB.

    A strip program owns ROWS rows of one matrix and a range of its columns. It reads its B strip once, then for each
    block of columns the W tile (ROWS×COLUMNS, in the checkpoint's dtype, once) and the A block; it adds W·Aᵀ to its Q
    share, in registers, and writes BᵀW of the tile to its own P slot. Bytes: ROWS·columns·size of W once, and
    4·r·columns read (A) and written (P), 4·r·ROWS read (B) and written (Q).
    A sum program adds up the shares of one Gram matrix, SUM_BLOCK entries of it, that the Adam kernel left.
    Program 0 also counts the step.

    SPLIT: 16-bit weights are exact in the tensor cores; the float32 factor goes in as two 16-bit halves, high + low,
    times a power of two that keeps float16's halves in its normal range. At rank 8 the halves lie side by side, which
    fills the 16 columns that the instruction computes anyway; above, they are two products into one accumulator.
    Otherwise (float32 weights) PRECISION names the float32 product: tf32x3, or ieee.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(step, tl.load(step) + 1)
    if program < sum_programs:
        work = sums + program * SUM_FIELDS
        share = tl.multiple_of(tl.load(work), 16)
        blocks = tl.load(work + 1)
        gram = tl.multiple_of(tl.load(work + 2), 16)
        first = tl.multiple_of(tl.load(work + 3), SUM_BLOCK)
        entries = first + tl.arange(0, SUM_BLOCK)
        block = tl.arange(0, SUM_WIDTH)
        total = tl.full((SUM_BLOCK,), 0.0, tl.float32)
        for start in range(0, blocks, SUM_WIDTH):
            part = tl.load(
                shares + share + (start + block)[:, None] * (RANK * RANK) + entries[None, :],
                mask=((start + block) < blocks)[:, None] & (entries < RANK * RANK)[None, :],
                other=0.0,
            )
            total += tl.sum(part, axis=0)
        tl.store(grams + gram + entries, total, mask=entries < RANK * RANK)
    else:
        work = strips + (program - sum_programs) * STRIP_FIELDS
        W = tl.multiple_of(tl.load(work), 16)
        stride = tl.multiple_of(tl.load(work + 1).to(tl.int32), 16)
        rows = tl.load(work + 2).to(tl.int32)
        first_column = tl.multiple_of(tl.load(work + 3).to(tl.int32), COLUMNS)
        last_column = tl.multiple_of(tl.load(work + 4).to(tl.int32), 16)
        A = tl.multiple_of(tl.load(work + 5), 16)
        B = tl.multiple_of(tl.load(work + 6), 16)
        B_stride = tl.multiple_of(tl.load(work + 7).to(tl.int32), 16)
        P = tl.multiple_of(tl.load(work + 8), 16)
        Q = tl.multiple_of(tl.load(work + 9), 16)
        rank = tl.load(work + 10).to(tl.int32)
        scale = tl.exp2(tl.load(work + 11).to(tl.float32))

        row = tl.arange(0, ROWS)
        r = tl.arange(0, RANK)
        inside_rank = r < rank
        inside_rows = row < rows
        B_strip = tl.load(
            factors + B + r[None, :] * B_stride + row[:, None],
            mask=inside_rows[:, None] & inside_rank[None, :],
            other=0.0,
        )
        if SPLIT:
            B_strip *= scale
            B_high = B_strip.to(weights.dtype.element_ty)
            B_low = (B_strip - B_high.to(tl.float32)).to(weights.dtype.element_ty)
            if INTERPRETED:
                B_high = B_high.to(tl.float32)
                B_low = B_low.to(tl.float32)
            if RANK == 8:
                B_high = tl.reshape(tl.join(B_high, B_low), (ROWS, 2 * RANK))
        WIDTH: tl.constexpr = 16 if RANK == 8 and SPLIT else RANK
        Q_share = tl.full((ROWS, WIDTH), 0.0, tl.float32)
        for start in tl.range(first_column, last_column, COLUMNS, num_stages=STAGES):
            column = start + tl.arange(0, COLUMNS)
            inside_columns = column < last_column
            W_tile = tl.load(
                weights + W + row[:, None] * stride + column[None, :],
                mask=inside_rows[:, None] & inside_columns[None, :],
                other=0.0,
            )
            A_block = tl.load(
                factors + A + r[None, :] * stride + column[:, None],
                mask=inside_columns[:, None] & inside_rank[None, :],
                other=0.0,
            )
            if INTERPRETED:
                W_tile = W_tile.to(tl.float32)
            if SPLIT:
                A_block *= scale
                A_high = A_block.to(weights.dtype.element_ty)
                A_low = (A_block - A_high.to(tl.float32)).to(weights.dtype.element_ty)
                if INTERPRETED:
                    A_high = A_high.to(tl.float32)
                    A_low = A_low.to(tl.float32)
                if RANK == 8:
                    A_pair = tl.reshape(tl.join(A_high, A_low), (COLUMNS, 2 * RANK))
                    Q_share = tl.dot(W_tile, A_pair, Q_share)
                    P_pair = tl.dot(tl.trans(W_tile), B_high)
                    P_share = tl.sum(tl.reshape(P_pair, (COLUMNS, RANK, 2)), axis=2)
                else:
                    Q_share = tl.dot(W_tile, A_low, Q_share)
                    Q_share = tl.dot(W_tile, A_high, Q_share)
                    P_share = tl.dot(tl.trans(W_tile), B_low)
                    P_share = tl.dot(tl.trans(W_tile), B_high, P_share)
                P_share /= scale
            else:
                Q_share = tl.dot(W_tile, tl.trans(tl.trans(A_block)), Q_share, input_precision=PRECISION)
                P_share = tl.dot(tl.trans(W_tile), B_strip, input_precision=PRECISION)
            tl.store(
                slots + P + r[None, :] * stride + column[:, None],
                P_share,
                mask=inside_columns[:, None] & inside_rank[None, :],
            )
        if SPLIT:
            if RANK == 8:
                Q_share = tl.sum(tl.reshape(Q_share, (ROWS, RANK, 2)), axis=2)
            Q_share /= scale
        tl.store(
            slots + Q + r[None, :] * B_stride + row[:, None],
            Q_share,
            mask=inside_rows[:, None] & inside_rank[None, :],
        )
