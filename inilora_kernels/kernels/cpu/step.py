"""Adam on ||W − BA||_F² for one matrix, many steps in one call, by one thread or by a team.

Layouts (float32 unless said otherwise; padding is zero, and zeros stay zero, so no kernel needs to know about edges):

    W  (strips, panels, strip rows, PANEL)   in the checkpoint's dtype; a tile is read once for BᵀW and, still in L2,
                                             once for WAᵀ
    A, its moments, each P slot  (panels, r, PANEL)
    B, its moments, Q            (strips · strip rows, r)

r is the rank rounded up to the rank group. A step has two phases with a barrier after each: the products, split over
slots of row strips, and the update, split over chunks of A's panels and of B's strips. The shape alone decides what is
summed where, so any number of threads gives the same bits.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .copies import copy_rows
from .jit import njit
from .products import B_BLOCK_ROWS, add_block_times_gram, add_gram_rows, add_panel, add_rows
from .simd import (
    LANES,
    PANEL,
    ROWS,
    SMALL_GROUP,
    VECTORS,
    atomic_add,
    inner_products,
    outer_products,
)
from .team import pause

TILE_PANELS = 8
A_CHUNK_PANELS = 8
Array = NDArray[np.float32]


class Side(NamedTuple):
    """One factor during a run: its value, Adam's two moments, its product with W, and its shares of the Gram matrix.

    products: P slots (slots, panels, r, PANEL) for A, Q for B. shares: (chunks, r, r) of AAᵀ, (strips, r, r) of BᵀB.
    """

    value: Array
    mean: Array
    square: Array
    products: Array
    shares: Array


class Steps(NamedTuple):
    """The steps of one call: the first one's number, each one's learning rate, and Adam's constants."""

    first: int
    rates: NDArray[np.float64]
    eps: float
    beta1: float
    beta2: float


class Member(NamedTuple):
    """One of the threads that make a call together, and its own work space.

    barrier: shared by the team. grams: (2, r, r). work: r·max(PANEL, B_BLOCK_ROWS).
    """

    number: int
    team: int
    barrier: NDArray[np.int64]
    grams: Array
    work: Array


class Rate(NamedTuple):
    """One step's rate lr/(1−β₁ⁱ) and root 1/√(1−β₂ⁱ), and Adam's constants."""

    rate: float
    root: float
    eps: float
    beta1: float
    beta2: float


@njit(cache=True, nogil=True, inline="always")
def _barrier(barrier: Any, team: int) -> None:
    """Wait until the whole team is here. barrier[0] counts arrivals, barrier[16] (another cache line) the rounds."""
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
        pause(spins)


@njit(cache=True, nogil=True)
def slot_products(W: Any, A: Any, B: Any, P: Any, Q: Any, first: int, last: int) -> None:
    """P = BᵀW over strips [first, last) and Q = WAᵀ for their rows. Reads W once from memory and once more from L2."""
    n_panels, strip_rows = W.shape[1], W.shape[2]
    rank = A.shape[1]
    W_flat, A_flat, B_flat = W.reshape(-1), A.reshape(-1), B.reshape(-1)
    P_flat, Q_flat = P.reshape(-1), Q.reshape(-1)
    tile = strip_rows * PANEL
    P_flat[:] = 0
    for strip in range(first, last):
        row = strip * strip_rows
        Q_flat[row * rank : (row + strip_rows) * rank] = 0
        for left in range(0, n_panels, TILE_PANELS):
            right = min(left + TILE_PANELS, n_panels)
            for panel in range(left, right):
                tile_at = (strip * n_panels + panel) * tile
                add_panel(P_flat, panel * rank * PANEL, B_flat, row * rank, W_flat, tile_at, strip_rows, rank)
            tile_at = (strip * n_panels + left) * tile
            for i in range(0, strip_rows, ROWS):
                Q_at, W_at = (row + i) * rank, tile_at + i * PANEL
                add_rows(Q_flat, Q_at, W_flat, W_at, tile, A_flat, left * rank * PANEL, right - left, rank)


@njit(cache=True, nogil=True, inline="always")
def _adam(x: Any, mean: Any, square: Any, half_gradient: Any, now: Any) -> None:
    """x ← x − rate·m / (√v·root + eps) for the gradient 2·half_gradient; see Rate."""
    keep1, take1 = np.float32(now.beta1), np.float32(1 - now.beta1)
    keep2, take2 = np.float32(now.beta2), np.float32(1 - now.beta2)
    rate, root, eps = np.float32(now.rate), np.float32(now.root), np.float32(now.eps)
    for j in range(x.size):
        gradient = half_gradient[j] + half_gradient[j]
        m = keep1 * mean[j] + take1 * gradient
        v = keep2 * square[j] + take2 * gradient * gradient
        mean[j] = m
        square[j] = v
        x[j] -= rate * m / (np.sqrt(v) * root + eps)


@njit(cache=True, nogil=True)
def update_A(A: Any, gram_B: Any, work: Any, first: int, last: int, now: Any) -> None:
    """Adam's step on panels [first, last) of A, a Side, with the gradient 2((BᵀB)A − Σ P)."""
    slots, rank = A.products.shape[0], A.value.shape[1]
    size = rank * PANEL
    A_flat, gram = A.value.reshape(-1), gram_B.reshape(-1)
    mean, square, P_flat = A.mean.reshape(-1), A.square.reshape(-1), A.products.reshape(slots, -1)
    half = work[:size]
    for panel in range(first, last):
        at = panel * size
        for j in range(size):
            half[j] = -P_flat[0, at + j]
        for slot in range(1, slots):
            for j in range(size):
                half[j] -= P_flat[slot, at + j]
        for p in range(0, rank, SMALL_GROUP):
            outer_products(
                half, p * PANEL, PANEL, gram, p, rank, 1, A_flat, at, PANEL, rank, SMALL_GROUP, LANES, VECTORS
            )
        end = at + size
        _adam(A_flat[at:end], mean[at:end], square[at:end], half, now)


@njit(cache=True, nogil=True)
def update_B(B: Any, gram_A: Any, work: Any, first: int, last: int, now: Any) -> None:
    """Adam's step on rows [first, last) of B, a Side, with the gradient 2(B(AAᵀ) − Q); a multiple of B_BLOCK_ROWS."""
    rank = B.value.shape[1]
    size = B_BLOCK_ROWS * rank
    B_flat, gram = B.value.reshape(-1), gram_A.reshape(-1)
    mean, square, Q_flat = B.mean.reshape(-1), B.square.reshape(-1), B.products.reshape(-1)
    half = work[:size]
    for row in range(first, last, B_BLOCK_ROWS):
        at = row * rank
        for j in range(size):
            half[j] = -Q_flat[at + j]
        add_block_times_gram(half, B_flat, at, gram, rank)
        end = at + size
        _adam(B_flat[at:end], mean[at:end], square[at:end], half, now)


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
    for i in range(0, rank, SMALL_GROUP):
        add_gram_rows(out, i * rank, B_flat, first * rank, i, last - first, rank)


@njit(cache=True, nogil=True, inline="always")
def _sum_shares(shares: Any, total: Any) -> None:
    copy_rows(shares[0], total)
    for share in range(1, shares.shape[0]):
        total += shares[share]


@njit(cache=True, nogil=True)
def run_steps(W: Any, A: Side, B: Side, slot_strips: int, steps: Steps, member: Member) -> None:
    """len(steps.rates) steps of Adam, as one of the threads that call this at the same time.

    Needs the Gram shares of the A and B that it starts from. slot_strips: strips of W that share a slot of P.
    """
    n_strips, n_panels, strip_rows = W.shape[0], W.shape[1], W.shape[2]
    n_slots, n_chunks = A.products.shape[0], A.shares.shape[0]
    number, team = member.number, member.team
    gram_A, gram_B = member.grams[0], member.grams[1]
    for offset in range(steps.rates.size):
        for slot in range(n_slots * number // team, n_slots * (number + 1) // team):
            first = slot * slot_strips
            last = min(first + slot_strips, n_strips)
            slot_products(W, A.value, B.value, A.products[slot], B.products, first, last)
        _sum_shares(A.shares, gram_A)
        _sum_shares(B.shares, gram_B)
        _barrier(member.barrier, team)
        power = steps.first + offset + 1
        rate = steps.rates[offset] / (1 - steps.beta1**power)
        now = Rate(rate, 1 / sqrt(1 - steps.beta2**power), steps.eps, steps.beta1, steps.beta2)
        for chunk in range(n_chunks * number // team, n_chunks * (number + 1) // team):
            first = chunk * A_CHUNK_PANELS
            last = min(first + A_CHUNK_PANELS, n_panels)
            update_A(A, gram_B, member.work, first, last, now)
            gram_of_A(A.value, first, last, A.shares[chunk])
        for strip in range(n_strips * number // team, n_strips * (number + 1) // team):
            first = strip * strip_rows
            last = first + strip_rows
            update_B(B, gram_A, member.work, first, last, now)
            gram_of_B(B.value, first, last, B.shares[strip])
        _barrier(member.barrier, team)


@njit(cache=True, nogil=True)
def strip_residual(W: Any, A: Any, B: Any) -> Any:
    """||W − BA||² of one strip in float64: W (panels, rows, PANEL) float32, A (panels, r, PANEL), B (rows, r)."""
    n_panels, rows = W.shape[0], W.shape[1]
    sums, residual = np.zeros(PANEL), np.empty(PANEL)
    wide = np.empty((A.shape[1], PANEL))
    for panel in range(n_panels):
        copy_rows(A[panel], wide)
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
