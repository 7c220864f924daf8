"""The two GPU kernels of a step. `layout` says what they read and write; `tiles` has their tiles.

All state of a wave lies in a few long buffers, and every program takes one row of a work list: offsets into the
buffers and sizes, in the fields of `layout`. So matrices of any shapes share a launch. A factor is stored rank-major
for both sides, A as (r×k) and B as Bᵀ (r×d), its rows padded with zeros to a multiple of 16 elements, which keeps every
load 128 bits wide. No program writes what another program of the same launch reads or writes: there are no atomics, and
every run gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from .layout import BlockField, StripField, SumField

# A kernel may read globals that are constexpr, and no others.
STRIP_FIELDS = tl.constexpr(len(StripField))
STRIP_W_OFFSET = tl.constexpr(int(StripField.W_OFFSET))
STRIP_STRIDE = tl.constexpr(int(StripField.STRIDE))
STRIP_ROWS = tl.constexpr(int(StripField.ROWS))
STRIP_FIRST_COLUMN = tl.constexpr(int(StripField.FIRST_COLUMN))
STRIP_LAST_COLUMN = tl.constexpr(int(StripField.LAST_COLUMN))
STRIP_A_OFFSET = tl.constexpr(int(StripField.A_OFFSET))
STRIP_B_OFFSET = tl.constexpr(int(StripField.B_OFFSET))
STRIP_B_STRIDE = tl.constexpr(int(StripField.B_STRIDE))
STRIP_P_OFFSET = tl.constexpr(int(StripField.P_OFFSET))
STRIP_Q_OFFSET = tl.constexpr(int(StripField.Q_OFFSET))
STRIP_RANK = tl.constexpr(int(StripField.RANK))
STRIP_MATRIX = tl.constexpr(int(StripField.MATRIX))
SUM_FIELDS = tl.constexpr(len(SumField))
SUM_SHARES_OFFSET = tl.constexpr(int(SumField.SHARES_OFFSET))
SUM_COUNT = tl.constexpr(int(SumField.COUNT))
SUM_GRAM_OFFSET = tl.constexpr(int(SumField.GRAM_OFFSET))
SUM_FIRST_ENTRY = tl.constexpr(int(SumField.FIRST_ENTRY))
BLOCK_FIELDS = tl.constexpr(len(BlockField))
BLOCK_X_OFFSET = tl.constexpr(int(BlockField.X_OFFSET))
BLOCK_STRIDE = tl.constexpr(int(BlockField.STRIDE))
BLOCK_FIRST_COLUMN = tl.constexpr(int(BlockField.FIRST_COLUMN))
BLOCK_RANK = tl.constexpr(int(BlockField.RANK))
BLOCK_SLOTS_OFFSET = tl.constexpr(int(BlockField.SLOTS_OFFSET))
BLOCK_SLOT_COUNT = tl.constexpr(int(BlockField.SLOT_COUNT))
BLOCK_SLOT_SIZE = tl.constexpr(int(BlockField.SLOT_SIZE))
BLOCK_GRAM_OFFSET = tl.constexpr(int(BlockField.GRAM_OFFSET))
BLOCK_SHARE_OFFSET = tl.constexpr(int(BlockField.SHARE_OFFSET))
BLOCK_MATRIX = tl.constexpr(int(BlockField.MATRIX))


@triton.jit(do_not_specialize=["sum_programs"])
def gradient_products_kernel(
    weights,
    factors,
    slots,
    shares,
    grams,
    exponents,
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
    PREFETCH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    W_POLICY: tl.constexpr,
    SLOT_POLICY: tl.constexpr,
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

    W_POLICY, SLOT_POLICY: which lines the cache gives up first. Where the wave lives in L2, W stays (evict_last) and
    the slots, written once and read once a step, go (evict_first); where W streams from DRAM, it is the other way.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(step, tl.load(step) + 1)
    if program < sum_programs:
        entry = sums + program * SUM_FIELDS
        shares_offset = tl.multiple_of(tl.load(entry + SUM_SHARES_OFFSET), 16)
        count = tl.load(entry + SUM_COUNT)
        gram_offset = tl.multiple_of(tl.load(entry + SUM_GRAM_OFFSET), 16)
        first = tl.multiple_of(tl.load(entry + SUM_FIRST_ENTRY), SUM_BLOCK)
        entries = first + tl.arange(0, SUM_BLOCK)
        block = tl.arange(0, SUM_WIDTH)
        total = tl.full((SUM_BLOCK,), 0.0, tl.float32)
        for first_block in range(0, count, SUM_WIDTH):
            part = tl.load(
                shares + shares_offset + (first_block + block)[:, None] * (RANK * RANK) + entries[None, :],
                mask=((first_block + block) < count)[:, None] & (entries < RANK * RANK)[None, :],
                other=0.0,
            )
            total += tl.sum(part, axis=0)
        tl.store(grams + gram_offset + entries, total, mask=entries < RANK * RANK)
    else:
        work = strips + (program - sum_programs) * STRIP_FIELDS
        W_offset = tl.multiple_of(tl.load(work + STRIP_W_OFFSET), 16)
        stride = tl.multiple_of(tl.load(work + STRIP_STRIDE).to(tl.int32), 16)
        rows = tl.load(work + STRIP_ROWS).to(tl.int32)
        first_column = tl.multiple_of(tl.load(work + STRIP_FIRST_COLUMN).to(tl.int32), COLUMNS)
        last_column = tl.multiple_of(tl.load(work + STRIP_LAST_COLUMN).to(tl.int32), 16)
        A_offset = tl.multiple_of(tl.load(work + STRIP_A_OFFSET), 16)
        B_offset = tl.multiple_of(tl.load(work + STRIP_B_OFFSET), 16)
        B_stride = tl.multiple_of(tl.load(work + STRIP_B_STRIDE).to(tl.int32), 16)
        P_offset = tl.multiple_of(tl.load(work + STRIP_P_OFFSET), 16)
        Q_offset = tl.multiple_of(tl.load(work + STRIP_Q_OFFSET), 16)
        rank = tl.load(work + STRIP_RANK).to(tl.int32)
        exponent = tl.load(exponents + tl.load(work + STRIP_MATRIX))
        scale = tl.exp2(exponent)
        unscale = tl.exp2(-exponent)

        row = tl.arange(0, ROWS)
        r = tl.arange(0, RANK)
        inside_rank = r < rank
        inside_rows = row < rows
        B_strip = tl.load(
            factors + B_offset + r[:, None] * B_stride + row[None, :],
            mask=inside_rank[:, None] & inside_rows[None, :],
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
                B_high = tl.reshape(tl.permute(tl.join(B_high, B_low), (2, 0, 1)), (2 * RANK, ROWS))
        WIDTH: tl.constexpr = 16 if RANK == 8 and SPLIT else RANK
        Q_share = tl.full((ROWS, WIDTH), 0.0, tl.float32)
        W_rows = weights + W_offset + row[:, None] * stride
        column = first_column + tl.arange(0, COLUMNS)
        if PREFETCH:
            W_next = tl.load(
                W_rows + column[None, :],
                mask=inside_rows[:, None] & (column < last_column)[None, :],
                other=0.0,
                eviction_policy=W_POLICY,
            )
        for start in tl.range(first_column, last_column, COLUMNS, num_stages=STAGES):
            column = start + tl.arange(0, COLUMNS)
            inside_columns = column < last_column
            if PREFETCH:
                W_tile = W_next
                column_next = column + COLUMNS
                W_next = tl.load(
                    W_rows + column_next[None, :],
                    mask=inside_rows[:, None] & (column_next < last_column)[None, :],
                    other=0.0,
                    eviction_policy=W_POLICY,
                )
            else:
                W_tile = tl.load(
                    W_rows + column[None, :],
                    mask=inside_rows[:, None] & inside_columns[None, :],
                    other=0.0,
                    eviction_policy=W_POLICY,
                )
            A_block = tl.load(
                factors + A_offset + r[None, :] * stride + column[:, None],
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
                    A_pair = tl.reshape(tl.permute(tl.join(A_high, A_low), (0, 2, 1)), (COLUMNS, 2 * RANK))
                    Q_share = tl.dot(W_tile, A_pair, Q_share)
                    P_pair = tl.trans(tl.dot(tl.trans(W_tile), tl.trans(B_high)))
                    P_share = tl.sum(tl.reshape(P_pair, (2, RANK, COLUMNS)), axis=0)
                else:
                    Q_share = tl.dot(W_tile, A_low, Q_share)
                    Q_share = tl.dot(W_tile, A_high, Q_share)
                    if RANK >= 64:
                        # The rank fills the instruction's rows by itself: P as it is stored, in fewer registers.
                        P_share = tl.dot(B_low, W_tile)
                        P_share = tl.dot(B_high, W_tile, P_share)
                    else:
                        P_share = tl.dot(tl.trans(W_tile), tl.trans(B_low))
                        P_share = tl.trans(tl.dot(tl.trans(W_tile), tl.trans(B_high), P_share))
                P_share *= unscale
            else:
                Q_share = tl.dot(W_tile, A_block, Q_share, input_precision=PRECISION)
                P_share = tl.trans(tl.dot(tl.trans(W_tile), tl.trans(B_strip), input_precision=PRECISION))
            tl.store(
                slots + P_offset + r[:, None] * stride + column[None, :],
                P_share,
                mask=inside_rank[:, None] & inside_columns[None, :],
                eviction_policy=SLOT_POLICY,
            )
        if SPLIT:
            if RANK == 8:
                Q_share = tl.sum(tl.reshape(Q_share, (ROWS, 2, RANK)), axis=1)
            Q_share *= unscale
        # Zeros go to the padding of Bᵀ's rows too, so that no slot holds anything that was not written this step.
        inside_padded = row < (rows + 15) // 16 * 16
        tl.store(
            slots + Q_offset + r[None, :] * B_stride + row[:, None],
            Q_share,
            mask=inside_padded[:, None] & inside_rank[None, :],
            eviction_policy=SLOT_POLICY,
        )


@triton.jit
def adam_kernel(
    factors,
    means,
    squares,
    slots,
    shares,
    grams,
    step,
    rates,
    epsilons,
    blocks,
    beta1,
    beta2,
    rest1,
    rest2,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adam on WIDTH columns of one factor, X = A or Bᵀ (r×n), whose gradient is 2(GX − P).

    For A, G = BᵀB and P = BᵀW; for Bᵀ, G = AAᵀ and P = (WAᵀ)ᵀ. A program sums the slots of P in their order, SLOTS at a
    time, reads the finished G, updates X and its two moments in place, and writes its share XXᵀ of the Gram matrix that
    the next step needs. The step's rate lr/(1−β₁ᵗ) and 1/(1−β₂ᵗ) stand ready in a table of the whole run, so that the
    host has no part in a step. Bytes: 4·r·WIDTH·(slots + 6) and 4·r² twice.
    rest1, rest2: 1−β₁, 1−β₂, rounded once from float64.
    """
    work = blocks + tl.program_id(0) * BLOCK_FIELDS
    X_offset = tl.multiple_of(tl.load(work + BLOCK_X_OFFSET), 16)
    stride = tl.multiple_of(tl.load(work + BLOCK_STRIDE).to(tl.int32), 16)
    first_column = tl.multiple_of(tl.load(work + BLOCK_FIRST_COLUMN).to(tl.int32), WIDTH)
    rank = tl.load(work + BLOCK_RANK).to(tl.int32)
    slots_offset = tl.multiple_of(tl.load(work + BLOCK_SLOTS_OFFSET), 16)
    slot_count = tl.load(work + BLOCK_SLOT_COUNT).to(tl.int32)
    slot_size = tl.multiple_of(tl.load(work + BLOCK_SLOT_SIZE), 16)
    gram_offset = tl.multiple_of(tl.load(work + BLOCK_GRAM_OFFSET), 16)
    share_offset = tl.multiple_of(tl.load(work + BLOCK_SHARE_OFFSET), 16)
    matrix = tl.load(work + BLOCK_MATRIX)
    time = tl.load(step) - 1

    r = tl.arange(0, RANK)
    column = first_column + tl.arange(0, WIDTH)
    inside = (r < rank)[:, None] & (column < stride)[None, :]
    place = r[:, None] * stride + column[None, :]
    if RANK == 8:
        # Under way before the slots are summed, which takes the longest; larger ranks lack the registers.
        x = tl.load(factors + X_offset + place, mask=inside, other=0.0)
        old_mean = tl.load(means + X_offset + place, mask=inside, other=0.0)
        old_square = tl.load(squares + X_offset + place, mask=inside, other=0.0)
    eps = tl.load(epsilons + matrix)
    rate = tl.load(rates + 2 * time)
    unbias2 = tl.load(rates + 2 * time + 1)
    total = tl.full((RANK, WIDTH), 0.0, tl.float32)
    for first_slot in range(0, slot_count, SLOTS):
        # Unrolled, so that SLOTS loads are under way; the same layout as the factor's, so that nothing is exchanged.
        for slot in tl.static_range(SLOTS):
            present = tl.where(first_slot + slot < slot_count, rank, 0)
            total += tl.load(
                slots + slots_offset + (first_slot + slot) * slot_size + place,
                mask=(r < present)[:, None] & (column < stride)[None, :],
                other=0.0,
            )

    if RANK == 8:
        # The sum over G's columns runs along the first axis of Xⱼ, so a product is laid out (inner, rank, column).
        product = tl.full((RANK, WIDTH), 0.0, tl.float32)
        for first_inner in tl.static_range(0, RANK, INNER):
            j = first_inner + tl.arange(0, INNER)
            G = tl.load(grams + gram_offset + r[None, :] * RANK + j[:, None])
            inner = tl.load(
                factors + X_offset + j[:, None, None] * stride + column[None, None, :],
                mask=(j < rank)[:, None, None] & (column < stride)[None, None, :],
                other=0.0,
            )
            product += tl.sum(G[:, :, None] * inner, axis=0)
    else:
        product = tl.full((RANK, WIDTH), 0.0, tl.float32)
        for first_inner in range(0, RANK, INNER):
            j = first_inner + tl.arange(0, INNER)
            G = tl.load(grams + gram_offset + r[:, None] * RANK + j[None, :])
            inner = tl.load(
                factors + X_offset + j[:, None] * stride + column[None, :],
                mask=(j < rank)[:, None] & (column < stride)[None, :],
                other=0.0,
            )
            product = tl.dot(G, inner, product, input_precision=PRECISION)

    gradient = 2.0 * (product - total)
    if RANK != 8:
        x = tl.load(factors + X_offset + place, mask=inside, other=0.0)
        old_mean = tl.load(means + X_offset + place, mask=inside, other=0.0)
        old_square = tl.load(squares + X_offset + place, mask=inside, other=0.0)
    mean = old_mean * beta1 + gradient * rest1
    square = old_square * beta2 + gradient * gradient * rest2
    x -= rate * mean / (tl.sqrt_rn(square * unbias2) + eps)
    # Outside the factor eps could be the only thing that keeps 0/0 away: those lanes must stay exactly zero.
    x = tl.where(inside, x, 0.0)
    # Other threads of this program read X's columns for their product: no one writes X before all have read it.
    tl.debug_barrier()
    tl.store(means + X_offset + place, mean, mask=inside)
    tl.store(squares + X_offset + place, square, mask=inside)
    tl.store(factors + X_offset + place, x, mask=inside)
    if RANK == 8:
        gram_share = tl.sum(x[:, None, :] * x[None, :, :], axis=2)
    else:
        gram_share = tl.dot(x, tl.trans(x), input_precision=PRECISION)
    tl.store(shares + share_offset + r[:, None] * RANK + r[None, :], gram_share)
