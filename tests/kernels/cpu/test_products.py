"""Ranks that fill no whole group, against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.products import (
    B_BLOCK_ROWS,
    add_block_times_gram,
    add_gram_rows,
    add_panel,
    add_rows,
)
from inilora_kernels.kernels.cpu.simd import GROUP, PANEL, ROWS, SMALL_GROUP

RANKS = pytest.mark.parametrize("rank", [SMALL_GROUP, GROUP, GROUP + SMALL_GROUP, 3 * GROUP + SMALL_GROUP])
COUNT, PANELS = 9, 2


@njit
def panel(P: Any, X: Any, W: Any, rank: int) -> None:
    add_panel(P, 0, X, 0, W, 0, 9, rank)


@njit
def rows(Q: Any, W: Any, A: Any, rank: int) -> None:
    add_rows(Q, 0, W, 0, ROWS * PANEL, A, 0, 2, rank)


@njit
def block(out: Any, X: Any, gram: Any, rank: int) -> None:
    add_block_times_gram(out, X, 0, gram, rank)


@njit
def gram(out: Any, X: Any, rank: int) -> None:
    for row in range(0, rank, SMALL_GROUP):
        add_gram_rows(out, row * rank, X, 0, row, 9, rank)


def check(
    kernel: Callable[..., None], before: NDArray[Any], operands: list[NDArray[Any]], expected: NDArray[Any], terms: int
) -> None:
    out = before.copy()
    kernel(out.reshape(-1), *(operand.reshape(-1) for operand in operands), before.shape[-1])
    assert np.abs(out - expected).max() < 4 * terms * 2.0**-24


def normal(*shape: int) -> NDArray[Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@RANKS
def test_products(rank: int) -> None:
    W, X, P = normal(COUNT, PANEL), normal(COUNT, rank), normal(rank, PANEL)
    out = P.copy()
    panel(out.reshape(-1), X.reshape(-1), W.reshape(-1), rank)
    assert np.abs(out - (P + X.astype(float).T @ W)).max() < 8 * COUNT * 2.0**-24
    tiles, A, Q = normal(PANELS, ROWS, PANEL), normal(PANELS, rank, PANEL), normal(ROWS, rank)
    expected = Q + np.einsum("nij,npj->ip", tiles.astype(float), A)
    check(rows, Q, [tiles, A], expected, PANELS * PANEL)
    X, G, out = normal(B_BLOCK_ROWS, rank), normal(rank, rank), normal(B_BLOCK_ROWS, rank)
    check(block, out, [X, G], out + X.astype(float) @ G, rank)
    X, out = normal(COUNT, rank), normal(rank, rank)
    check(gram, out, [X], out + X.astype(float).T @ X, COUNT)
