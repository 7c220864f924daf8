"""The certificate of given Ritz vectors, against float64's SVD: what arithmetic did to them is in their residuals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.ritz import RitzPairs
from inilora_kernels.solvers.triplets import LastPass, Principal, concluded

RANK, N = 3, 40


def concluded_from(W: Tensor, X: Tensor) -> Principal:
    """As if a float32 space had ended with X, and with the exact bound on what is outside of it."""
    M = W.T @ W
    beyond = torch.eye(N, dtype=torch.float64) - X @ X.T
    missed = float(torch.linalg.eigvalsh(beyond @ M @ beyond)[-1])
    values = torch.linalg.eigvalsh(X.T @ M @ X).flip(0)
    pairs = RitzPairs(values.numpy(), np.zeros((X.shape[1], 1)), torch.diag(values).numpy())
    goal = Goal(float(W.square().sum()), (RANK,), tolerance=1e-8, unit=2.0**-23, exact=False)
    return concluded(
        goal,
        pairs,
        missed,
        LastPass(X.T.contiguous(), (W @ X).T.contiguous(), (M @ X).T.contiguous()),
        passes=1,
        vectors=1,
    )


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-7, 1e-4, 1e-2])
def test_noise_in_the_vectors_is_in_the_certificate(noise: float) -> None:
    """The space says that its residuals are zero; the vectors are off by `noise` all the same."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(60, N, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    W = (U * torch.arange(1, N + 1).double() ** -0.5) @ Vh
    X = Vh[:RANK].T + noise * torch.randn(N, RANK, generator=generator, dtype=torch.float64)
    found = concluded_from(W, torch.linalg.qr(X).Q)
    squares = torch.linalg.svdvals(W).square()
    lacking = float(squares[:RANK].sum() - found.S.square().sum())
    assert lacking <= found.shortfalls[RANK] + 1e-14
    assert found.certified[RANK] == (noise < 1e-6)
    assert found.optimum(RANK) <= float(squares[RANK:].sum())
