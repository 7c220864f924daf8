"""The basis and its projection of M, against M itself, where blocks lose rank and where two spaces are joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.dense import combine
from inilora_kernels.kernels.streaming import gram_multiplier
from inilora_kernels.solvers.krylov_space import KrylovSpace

N = 120


def space(W: Tensor, start: Tensor, fixed: Tensor | None = None) -> KrylovSpace:
    multiply = gram_multiplier(W, torch.float64, threads=1)
    return KrylovSpace(multiply, start, torch.Generator().manual_seed(3), fixed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {
    "full rank": normal(150, N),
    # The third block finds nothing new, and random directions take its place.
    "rank 5": normal(150, 5) @ normal(5, N, seed=1),
    "zero": torch.zeros(150, N, dtype=torch.float64),
}


def require_orthonormal(Q: Tensor) -> None:
    torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q), dtype=torch.float64), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", WEIGHTS)
def test_basis_and_projection_hold_for_any_rank(name: str) -> None:
    W = WEIGHTS[name]
    M = W.T @ W
    built = space(W, normal(4, N, seed=2))
    for _ in range(6):
        built.expand()
        require_orthonormal(built.Q)
        # Of float64 sums over 150 products, against M's size.
        torch.testing.assert_close(built.T, built.Q @ M @ built.Q.T, rtol=0.0, atol=1e-13 * float(M.norm() + 1))
    assert (built.size, built.passes) == (24, 6)


def test_a_start_with_equal_rows_is_made_independent() -> None:
    built = space(WEIGHTS["full rank"], normal(1, N).expand(4, N).contiguous())
    built.expand()
    require_orthonormal(built.Q)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_coupling_is_the_residual_of_every_ritz_pair(name: str) -> None:
    W = WEIGHTS[name]
    M = W.T @ W
    built = space(W, normal(4, N, seed=2))
    for _ in range(5):
        built.expand()
    pairs = built.ritz()
    X = pairs.vectors(built.size) @ built.Q
    residuals = (X @ M - torch.from_numpy(pairs.theta)[:, None] * X).norm(dim=1)
    torch.testing.assert_close(
        torch.from_numpy(pairs.g).norm(dim=1), residuals, rtol=1e-9, atol=1e-12 * float(M.norm() + 1)
    )
    chosen = combine(built.Q, pairs.vectors(3), threads=1)
    require_orthonormal(chosen)
    torch.testing.assert_close(chosen, X[:3], rtol=0.0, atol=1e-12)


def test_a_joined_space_is_one_space() -> None:
    """The second one was kept orthogonal to the first; together they still know QMQᵀ and every residual."""
    W = WEIGHTS["full rank"]
    M = W.T @ W
    built = space(W, normal(4, N, seed=2))
    for _ in range(4):
        built.expand()
    second = space(W, normal(3, N, seed=5), fixed=built.Q.clone())
    for _ in range(3):
        second.expand()
    torch.testing.assert_close(second.Q @ built.Q.T, torch.zeros(9, 16, dtype=torch.float64), rtol=0.0, atol=1e-13)
    built.take(second)
    built.expand()
    require_orthonormal(built.Q)
    torch.testing.assert_close(built.T, built.Q @ M @ built.Q.T, rtol=0.0, atol=1e-12 * float(M.norm()))
    pairs = built.ritz()
    X = pairs.vectors(built.size) @ built.Q
    residuals = (X @ M - torch.from_numpy(pairs.theta)[:, None] * X).norm(dim=1)
    torch.testing.assert_close(
        torch.from_numpy(pairs.g).norm(dim=1), residuals, rtol=1e-8, atol=1e-11 * float(M.norm())
    )
    assert built.passes == 4 + 3 + 1


def test_there_is_room_until_two_blocks_no_longer_fit() -> None:
    built = space(normal(30, 20), normal(4, 20, seed=2))
    while built.room:
        built.expand()
    assert built.size == 16
    require_orthonormal(built.Q)
