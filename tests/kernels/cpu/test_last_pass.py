"""The triplets that a last pass or a whole Gram matrix gives, against float64's own decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inilora_kernels.kernels.cpu.last_pass import by_gram, combine
from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.ritz import RitzPairs
from inilora_kernels.solvers.triplets import LastPass, _triplets, _triplets_on_device


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "n", "s"), [(5, 9, 1), (40, 1030, 7), (70, 90, 33)])
def test_combinations_are_orthonormal_and_span_the_same(m: int, n: int, s: int) -> None:
    rows = torch.linalg.qr(normal(n, m)).Q.T.float().contiguous()
    weights = torch.linalg.qr(normal(m, s, seed=1)).Q.T.contiguous()
    X = combine(rows.numpy(), weights.numpy())
    assert np.abs(X @ X.T - np.eye(s)).max() < 1e-14
    wanted = (weights @ rows.double()).numpy()
    # Off by no more than what orthonormalizing float32's rows changes.
    assert np.abs(X - wanted).max() < 1e-6
    assert np.abs(wanted - (wanted @ X.T) @ X).max() < 1e-14


@pytest.mark.parametrize(("d", "k", "count"), [(1, 1, 1), (30, 30, 30), (70, 64, 12)])
def test_by_gram(d: int, k: int, count: int) -> None:
    W = normal(d, k)
    U, S, V, found = by_gram(W.numpy(), count)
    assert found
    true_U, true_S, true_Vh = torch.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(S[: count // 2 + 1], true_S[: count // 2 + 1], rtol=1e-12)
    product = (U.T[:, :count] * S) @ V
    best = ((true_U[:, :count] * true_S[:count]) @ true_Vh[:count]).numpy()
    # A Gram matrix has the square of the condition.
    assert np.linalg.norm(product - best) <= 1e-10 * float(true_S[0])


def test_on_a_device_it_is_the_same() -> None:
    """There torch computes what here is compiled."""
    W = normal(60, 40) * torch.arange(1, 41).double() ** -0.5
    M = W.T @ W
    X = torch.linalg.svd(W).Vh[:6] + 1e-7 * normal(6, 40, seed=2)
    X = torch.linalg.qr(X.T).Q.T.contiguous()
    values = torch.linalg.eigvalsh(X @ M @ X.T).flip(0)
    pairs = RitzPairs(values.numpy(), np.full((6, 1), 1e-7), torch.diag(values).numpy())
    goal = Goal(float(W.square().sum()), (2, 4), tolerance=1e-8, unit=2.0**-23, exact=False)
    asked = (pairs.theta, pairs.g, goal.each_rank, float(values[5]) * 0.9, goal.numbers)
    (U, V, here), (other_U, other_V, there) = (
        compute(LastPass(X.clone(), X @ W.T, X @ M), asked) for compute in (_triplets, _triplets_on_device)
    )
    np.testing.assert_allclose(here[0], there[0], rtol=1e-13)
    # Differences of sums of squares, which are rounded.
    np.testing.assert_allclose(here[2], there[2], rtol=1e-6, atol=1e-14 * goal.energy)
    assert here[3].tolist() == there[3].tolist() == [True, True]
    signs = (V * other_V).sum(1).sign()[:, None]
    torch.testing.assert_close(V, signs * other_V, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(U, signs * other_U, rtol=0.0, atol=1e-11)
