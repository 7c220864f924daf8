"""The register-blocked products of simd.py over all ranks: whole groups of GROUP, then the rest in SMALL_GROUPs.

In all of them `rank` is a multiple of SMALL_GROUP. The arrays are flat; `*_at` is an element's place in one, and the
layouts are those of step.py: panels (rank, PANEL), rows of `rank` entries.
"""

from __future__ import annotations

from typing import Any

from .jit import njit
from .simd import GROUP, LANES, PANEL, ROWS, SMALL_GROUP, VECTORS, inner_products, outer_products

B_BLOCK_ROWS = 6


@njit(cache=True, nogil=True, inline="always")
def add_panel(
    P: Any, P_at: int, X: Any, X_at: int, W: Any, W_at: int, count: int, rank: int
) -> None:  # fmt: skip
    """P[p, :] += Σ_i X[i, p] · W[i, :] over `count` rows of one panel of W: 2·count·rank·PANEL FLOPs.

    Reads W's rows, PANEL apart, rank/GROUP times, and X's rows of `rank` entries; reads and writes P (rank, PANEL).
    """
    for p in range(0, rank, GROUP):
        if rank - p >= GROUP:
            outer_products(
                P, P_at + p * PANEL, PANEL, X, X_at + p, rank, 1, W, W_at, PANEL, count, GROUP, LANES, VECTORS
            )
        else:
            outer_products(
                P, P_at + p * PANEL, PANEL, X, X_at + p, rank, 1, W, W_at, PANEL, count, SMALL_GROUP, LANES, VECTORS
            )


@njit(cache=True, nogil=True, inline="always")
def add_rows(
    Q: Any, Q_at: int, W: Any, W_at: int, tile: int, A: Any, A_at: int, panels: int, rank: int
) -> None:  # fmt: skip
    """Q[i, p] += Σ_j W[i, j] · A[p, j] for ROWS rows over `panels` panels: 2·ROWS·rank·panels·PANEL FLOPs.

    Reads the ROWS rows of W, whose panels are `tile` apart, rank/GROUP times, and A's panels (rank, PANEL); reads and
    writes Q's rows of `rank` entries.
    """
    for p in range(0, rank, GROUP):
        if rank - p >= GROUP:
            inner_products(Q, Q_at + p, rank, W, W_at, tile, A, A_at + p * PANEL, rank * PANEL, panels, ROWS, GROUP)
        else:
            inner_products(
                Q, Q_at + p, rank, W, W_at, tile, A, A_at + p * PANEL, rank * PANEL, panels, ROWS, SMALL_GROUP
            )


@njit(cache=True, nogil=True, inline="always")
def add_block_times_gram(out: Any, X: Any, X_at: int, gram: Any, rank: int) -> None:
    """out += X · G for B_BLOCK_ROWS rows of X and the gram matrix G (rank×rank); both have rows of `rank` entries."""
    for p in range(0, rank, GROUP):
        if rank - p >= GROUP:
            outer_products(out, p, rank, X, X_at, 1, rank, gram, p, rank, rank, B_BLOCK_ROWS, GROUP, 1)
        else:
            outer_products(out, p, rank, X, X_at, 1, rank, gram, p, rank, rank, B_BLOCK_ROWS, SMALL_GROUP, 1)


@njit(cache=True, nogil=True, inline="always")
def add_gram_rows(out: Any, out_at: int, X: Any, X_at: int, row: int, count: int, rank: int) -> None:
    """Rows [row, row + SMALL_GROUP) of XᵀX added to `out`, over `count` rows of X of `rank` entries from X_at on."""
    for p in range(0, rank, GROUP):
        if rank - p >= GROUP:
            outer_products(
                out, out_at + p, rank, X, X_at + row, rank, 1, X, X_at + p, rank, count, SMALL_GROUP, GROUP, 1
            )
        else:
            outer_products(
                out, out_at + p, rank, X, X_at + row, rank, 1, X, X_at + p, rank, count, SMALL_GROUP, SMALL_GROUP, 1
            )
