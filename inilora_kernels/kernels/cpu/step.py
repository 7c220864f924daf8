"""Adam on ||W − BA||_F² for one matrix, many steps in one call, by one thread or by a team.

Layouts (float32 unless said otherwise; padding is zero, and zeros stay zeros, so no kernel knows of edges):

    W  (strips, panels, strip rows, PANEL)   in the checkpoint's dtype; a tile is read once for BᵀW and, still in L2,
                                             once for WAᵀ
    A, its moments, each P slot  (panels, r, PANEL)
    B, its moments, Q            (strips · strip rows, r)

r is the rank rounded up to the rank group. A step has two phases with a barrier after each: the products, split over
slots of row strips, and the update, split over chunks of A's panels and of B's strips. What is summed where is fixed by
the shape alone, never by the number of threads, so any number of threads gives the same bits.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from .jit import njit
from .simd import (
    GROUP,
    LANES,
    PANEL,
    ROWS,
    SMALL_GROUP,
    VECTORS,
    atomic_add,
    give_way,
    inner_products,
    outer_products,
    spin_pause,
)

TILE_PANELS = 8
A_CHUNK_PANELS = 8
B_BLOCK_ROWS = 6
SPINS_BEFORE_YIELD = 4000


@njit(cache=True, nogil=True, inline="always")
def _barrier(barrier: Any, team: int) -> None:
    """Wait until all of the team are here. barrier[0] counts arrivals, barrier[16] (another cache line) the rounds."""
    if team == 1:
        return
    turn = atomic_add(barrier, 16, 0)
    if atomic_add(barrier, 0, 1) == team - 1:
        atomic_add(barrier, 0, -team)
        atomic_add(barrier, 16, 1)
        return
    spins = 0
    while atomic_add(barrier, 16, 0) == turn:
        spins += 1
        spin_pause()
        if spins > SPINS_BEFORE_YIELD:
            give_way()


@njit(cache=True, nogil=True)
def slot_products(W: Any, A: Any, B: Any, P: Any, Q: Any, first: int, last: int) -> None:
    """P = BᵀW over strips [first, last) and Q = WAᵀ for their rows. Reads W once from memory, once more from L2."""
    n_panels, strip_rows = W.shape[1], W.shape[2]
    rank = A.shape[1]
    W_flat, A_flat, B_flat, P_flat, Q_flat = (
        W.reshape(-1),
        A.reshape(-1),
        B.reshape(-1),
        P.reshape(-1),
        Q.reshape(-1),
    )
    tile = strip_rows * PANEL
    P_flat[:] = 0
    for strip in range(first, last):
        row = strip * strip_rows
        Q_flat[row * rank : (row + strip_rows) * rank] = 0
        for left in range(0, n_panels, TILE_PANELS):
            right = min(left + TILE_PANELS, n_panels)
            for panel in range(left, right):
                tile_at = (strip * n_panels + panel) * tile
                for p in range(0, rank, GROUP):
                    P_at = (panel * rank + p) * PANEL
                    if rank - p >= GROUP:
                        outer_products(
                            P_flat, P_at, PANEL, B_flat, row * rank + p, rank, 1, W_flat, tile_at, PANEL,
                            strip_rows, GROUP, LANES, VECTORS,
                        )  # fmt: skip
                    else:
                        outer_products(
                            P_flat, P_at, PANEL, B_flat, row * rank + p, rank, 1, W_flat, tile_at, PANEL,
                            strip_rows, SMALL_GROUP, LANES, VECTORS,
                        )  # fmt: skip
            tile_at = (strip * n_panels + left) * tile
            for i in range(0, strip_rows, ROWS):
                for p in range(0, rank, GROUP):
                    Q_at = (row + i) * rank + p
                    A_at = (left * rank + p) * PANEL
                    if rank - p >= GROUP:
                        inner_products(
                            Q_flat, Q_at, rank, W_flat, tile_at + i * PANEL, tile, A_flat, A_at, rank * PANEL,
                            right - left, ROWS, GROUP,
                        )  # fmt: skip
                    else:
                        inner_products(
                            Q_flat, Q_at, rank, W_flat, tile_at + i * PANEL, tile, A_flat, A_at, rank * PANEL,
                            right - left, ROWS, SMALL_GROUP,
                        )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _adam(
    x: Any,
    mean: Any,
    square: Any,
    half_gradient: Any,
    rate: Any,
    root: Any,
    eps: Any,
    beta1: float,
    beta2: float,
) -> None:
    """x ← x − rate·m / (√v·root + eps), rate = lr/(1−β₁ⁱ), root = 1/√(1−β₂ⁱ), for the gradient 2·half_gradient."""
    keep1, take1 = np.float32(beta1), np.float32(1 - beta1)
    keep2, take2 = np.float32(beta2), np.float32(1 - beta2)
    rate, root, eps = np.float32(rate), np.float32(root), np.float32(eps)
    for j in range(x.size):
        gradient = half_gradient[j] + half_gradient[j]
        m = keep1 * mean[j] + take1 * gradient
        v = keep2 * square[j] + take2 * gradient * gradient
        mean[j] = m
        square[j] = v
        x[j] -= rate * m / (np.sqrt(v) * root + eps)


@njit(cache=True, nogil=True)
def update_A(
    A: Any, A_mean: Any, A_square: Any, P: Any, gram_B: Any, work: Any, first: int, last: int, rate: float, root: float,
    eps: float, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """Adam's step on panels [first, last) of A with the gradient 2((BᵀB)A − Σ P)."""
    rank = A.shape[1]
    size = rank * PANEL
    A_flat, gram = A.reshape(-1), gram_B.reshape(-1)
    mean, square, P_flat = A_mean.reshape(-1), A_square.reshape(-1), P.reshape(P.shape[0], -1)
    half = work[:size]
    for panel in range(first, last):
        at = panel * size
        for j in range(size):
            half[j] = -P_flat[0, at + j]
        for slot in range(1, P.shape[0]):
            for j in range(size):
                half[j] -= P_flat[slot, at + j]
        for p in range(0, rank, SMALL_GROUP):
            outer_products(
                half, p * PANEL, PANEL, gram, p, rank, 1, A_flat, at, PANEL, rank, SMALL_GROUP, LANES, VECTORS
            )
        end = at + size
        _adam(A_flat[at:end], mean[at:end], square[at:end], half, rate, root, eps, beta1, beta2)


@njit(cache=True, nogil=True)
def update_B(
    B: Any, B_mean: Any, B_square: Any, Q: Any, gram_A: Any, work: Any, first: int, last: int, rate: float, root: float,
    eps: float, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """Adam's step on rows [first, last) of B with the gradient 2(B(AAᵀ) − Q); a multiple of B_BLOCK_ROWS rows."""
    rank = B.shape[1]
    size = B_BLOCK_ROWS * rank
    B_flat, gram = B.reshape(-1), gram_A.reshape(-1)
    mean, square, Q_flat = B_mean.reshape(-1), B_square.reshape(-1), Q.reshape(-1)
    half = work[:size]
    for row in range(first, last, B_BLOCK_ROWS):
        at = row * rank
        for j in range(size):
            half[j] = -Q_flat[at + j]
        for p in range(0, rank, GROUP):
            if rank - p >= GROUP:
                outer_products(half, p, rank, B_flat, at, 1, rank, gram, p, rank, rank, B_BLOCK_ROWS, GROUP, 1)
            else:
                outer_products(half, p, rank, B_flat, at, 1, rank, gram, p, rank, rank, B_BLOCK_ROWS, SMALL_GROUP, 1)
        end = at + size
        _adam(B_flat[at:end], mean[at:end], square[at:end], half, rate, root, eps, beta1, beta2)


@njit(cache=True, nogil=True)
def gram_of_A(A: Any, first: int, last: int, gram: Any) -> None:
    """AAᵀ over panels [first, last)."""
    rank = A.shape[1]
    A_flat, out = A.reshape(-1), gram.reshape(-1)
    out[:] = 0
    at, step = first * rank * PANEL, rank * PANEL
    for i in range(0, rank, 2):
        for p in range(0, rank, SMALL_GROUP):
            inner_products(
                out, i * rank + p, rank, A_flat, at + i * PANEL, step, A_flat, at + p * PANEL, step, last - first,
                2, SMALL_GROUP,
            )  # fmt: skip


@njit(cache=True, nogil=True)
def gram_of_B(B: Any, first: int, last: int, gram: Any) -> None:
    """BᵀB over rows [first, last)."""
    rank = B.shape[1]
    B_flat, out = B.reshape(-1), gram.reshape(-1)
    out[:] = 0
    at = first * rank
    for i in range(0, rank, SMALL_GROUP):
        for p in range(0, rank, GROUP):
            if rank - p >= GROUP:
                outer_products(
                    out, i * rank + p, rank, B_flat, at + i, rank, 1, B_flat, at + p, rank, last - first,
                    SMALL_GROUP, GROUP, 1,
                )  # fmt: skip
            else:
                outer_products(
                    out, i * rank + p, rank, B_flat, at + i, rank, 1, B_flat, at + p, rank, last - first,
                    SMALL_GROUP, SMALL_GROUP, 1,
                )  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _sum_shares(shares: Any, total: Any) -> None:
    total[:] = shares[0]
    for share in range(1, shares.shape[0]):
        total += shares[share]


@njit(cache=True, nogil=True)
def run_steps(
    W: Any, A: Any, A_mean: Any, A_square: Any, B: Any, B_mean: Any, B_square: Any, P: Any, Q: Any,
    slot_strips: int, A_shares: Any, B_shares: Any, grams: Any, work: Any, first_step: int, rates: Any, eps: float,
    beta1: float, beta2: float, member: int, team: int, barrier: Any,
) -> None:  # fmt: skip
    """len(rates) steps of Adam from step `first_step` on, as `member` of a `team` of threads calling this at once.

    Needs the Gram shares of the A and B that it starts from. grams and work are this member's own: grams (2, r, r).
    """
    n_strips, n_panels, strip_rows = W.shape[0], W.shape[1], W.shape[2]
    n_slots, n_chunks = P.shape[0], A_shares.shape[0]
    gram_A, gram_B = grams[0], grams[1]
    for offset in range(rates.size):
        for slot in range(n_slots * member // team, n_slots * (member + 1) // team):
            first = slot * slot_strips
            slot_products(W, A, B, P[slot], Q, first, min(first + slot_strips, n_strips))
        _sum_shares(A_shares, gram_A)
        _sum_shares(B_shares, gram_B)
        _barrier(barrier, team)
        power = first_step + offset + 1
        rate = rates[offset] / (1 - beta1**power)
        root = 1 / sqrt(1 - beta2**power)
        for chunk in range(n_chunks * member // team, n_chunks * (member + 1) // team):
            first = chunk * A_CHUNK_PANELS
            last = min(first + A_CHUNK_PANELS, n_panels)
            update_A(A, A_mean, A_square, P, gram_B, work, first, last, rate, root, eps, beta1, beta2)
            gram_of_A(A, first, last, A_shares[chunk])
        for strip in range(n_strips * member // team, n_strips * (member + 1) // team):
            first = strip * strip_rows
            last = first + strip_rows
            update_B(B, B_mean, B_square, Q, gram_A, work, first, last, rate, root, eps, beta1, beta2)
            gram_of_B(B, first, last, B_shares[strip])
        _barrier(barrier, team)


@njit(cache=True, nogil=True)
def strip_residual(W: Any, A: Any, B: Any) -> Any:
    """||W − BA||² of one strip in float64: W (panels, rows, PANEL) float32, A (panels, r, PANEL), B (rows, r)."""
    n_panels, rows = W.shape[0], W.shape[1]
    sums, residual = np.zeros(PANEL), np.empty(PANEL)
    wide = np.empty((A.shape[1], PANEL))
    for panel in range(n_panels):
        wide[:] = A[panel]
        for i in range(rows):
            for j in range(PANEL):
                residual[j] = W[panel, i, j]
            for p in range(wide.shape[0]):
                factor = np.float64(B[i, p])
                for j in range(PANEL):
                    residual[j] -= factor * wide[p, j]
            for j in range(PANEL):
                sums[j] += residual[j] * residual[j]
    return sums.sum()
