"""The compiled end of a small matrix's search, against the same in float64 by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.cpu.conclusion import conclude
from inilora_kernels.kernels.cpu.gram import FusedGramReader
from inilora_kernels.kernels.cpu.judgement import verdict
from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.ritz import RitzPairs, ritz_pairs


def matrix(d: int, k: int, *, transposed: bool) -> Tensor:
    """W (d×k), float32, whose rows or columns are contiguous, with falling singular values."""
    stream = torch.Generator().manual_seed(d + k)
    W = torch.randn(d, k, generator=stream) * torch.arange(1.0, k + 1).pow(-0.3)
    return W.T.contiguous().T if transposed else W


def space(W: Tensor, size: int) -> tuple[np.ndarray, RitzPairs]:
    """A basis (m×k, float32) near W's leading right singular vectors, and its Ritz pairs."""
    M = W.double().T @ W.double()
    stream = torch.Generator().manual_seed(1)
    start = torch.linalg.eigh(M).eigenvectors.flip(1)[:, :size]
    Q = torch.linalg.qr(start + 1e-5 * torch.randn(start.shape, generator=stream, dtype=torch.float64))[0]
    left = M @ Q - Q @ (Q.T @ M @ Q)
    leaving = torch.linalg.qr(left)[1]
    return np.ascontiguousarray(Q.T.float().numpy()), ritz_pairs(Q.T @ M @ Q, leaving)


def concluded(W: Tensor, basis: np.ndarray, pairs: RitzPairs, goal: Goal, outside: float, count: int) -> Any:
    reader = FusedGramReader(W, count, threads=1, dtype=torch.float64)
    return conclude(*reader.compiled, basis, pairs.theta, pairs.reduced, goal.each_rank, outside, goal.numbers, count)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("d", "k", "rank", "count"), [(96, 64, 5, 5), (200, 131, 8, 10), (130, 130, 16, 16)])
def test_it_is_what_float64_gives(d: int, k: int, rank: int, count: int, transposed: bool) -> None:
    W = matrix(d, k, transposed=transposed)
    basis, pairs = space(W, 2 * count)
    goal = Goal(float(W.double().square().sum()), (2, rank), 1e-8, 2.0**-23, exact=False)
    outside = 1.01 * float(pairs.theta[count])
    found, U, values, V, shortfalls, certified = concluded(W, basis, pairs, goal, outside, count)
    assert found
    assert U.shape == (rank, d)
    assert V.shape == (rank, k)
    # The reference: the leading Ritz vectors of the basis as it was rounded, in float64 throughout.
    wide = W.double().numpy()
    turned = np.linalg.eigh(pairs.T)[1][:, ::-1][:, :count].T @ basis.astype(np.float64)
    X = np.linalg.qr(turned.T)[0].T
    Y = X @ wide.T
    form, image = Y @ Y.T, Y @ wide
    R = image - form @ X
    expected, chosen, _, _ = verdict(form, R @ R.T, goal.each_rank, outside, goal.numbers)
    # The combinations are summed in float32: 2⁻²⁴ of a unit row for each of the basis's, and their squares in values.
    assert np.allclose(values, expected, rtol=0, atol=1e-11 * expected[0])
    own, other = V.T @ V, (chosen @ X).T @ (chosen @ X)
    assert np.abs(own - other).max() < 1e-5
    # By themselves they are float64's: orthonormal, and US = WV.
    assert np.abs(V @ V.T - np.eye(rank)).max() < 1e-13
    assert np.abs(U * np.sqrt(values[:rank, None]) - V @ wide.T).max() < 1e-12 * np.sqrt(values[0])
    # What is proven, of the vectors that it kept: its own residuals, by the same verdict.
    if count == rank:
        residuals = V @ wide.T @ wide - values[:rank, None] * V
        gram = residuals @ residuals.T
        same = verdict(np.diag(values), gram, goal.each_rank, outside, goal.numbers)
        assert np.allclose(shortfalls, same[2], rtol=1e-6, atol=1e-12 * values[0])
        assert certified.tolist() == same[3].tolist()


def test_what_has_no_vectors_is_left_to_others() -> None:
    W = torch.zeros(96, 64)
    basis = np.eye(8, 64, dtype=np.float32)
    pairs = ritz_pairs(torch.zeros(8, 8).double(), torch.zeros(4, 8).double())
    goal = Goal(1.0, (4,), 1e-8, 2.0**-23, exact=False)
    assert not concluded(W, basis, pairs, goal, 0.5, 4)[0]


def test_dependent_rows_are_left_to_others() -> None:
    W = matrix(96, 64, transposed=False)
    basis, pairs = space(W, 8)
    basis[:] = basis[0]
    goal = Goal(float(W.double().square().sum()), (4,), 1e-8, 2.0**-23, exact=False)
    assert not concluded(W, basis, pairs, goal, 0.5 * float(pairs.theta[4]), 4)[0]
