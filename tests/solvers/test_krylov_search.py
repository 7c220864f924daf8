"""What a search returns before anything is proven: the pairs, their space, and what it cost."""

from __future__ import annotations

import torch

from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.krylov_search import ALL_THREADS, Searched, digest, expected_vectors, search

from .test_krylov import with_spectrum


def searched(W: torch.Tensor, rank: int) -> Searched:
    goal = Goal(float(W.double().square().sum()), (rank,), 1e-8, 2.0**-23, exact=False)
    found = search(W, goal, torch.float32, lambda: bytes(32), threads=1)
    assert found is not None
    return found


def test_the_space_holds_its_pairs() -> None:
    for shape in ((620, 540), (1300, 1200)):
        W = with_spectrum(*shape, lambda i: i**-0.5)
        found = searched(W, 8)
        Q, M = found.basis.double(), W.double().T @ W.double()
        X = found.pairs.vectors(8) @ Q
        residuals = X @ M - torch.from_numpy(found.pairs.theta[:8])[:, None] * X
        lengths = torch.from_numpy(found.pairs.g[:8]).norm(dim=1)
        # Of float32's products: a hundredth of what goal.py allows for a step.
        torch.testing.assert_close(residuals.norm(dim=1), lengths, rtol=1e-2, atol=1e-6)
        others = torch.eye(shape[1]).double() - X[: found.kept].T @ X[: found.kept]
        assert float(torch.linalg.eigvalsh(others @ M @ others)[-1]) <= found.outside
        assert found.settled
        assert len(Q) == found.vectors < 2 * expected_vectors(8, shape[1])
        assert found.passes * 4 == found.vectors


def test_a_start_is_decided_by_every_entry_wherever_it_lies() -> None:
    """Enough entries that several threads have something to do; columns as they lie, and a transposed matrix."""
    W = torch.randn(700, 600, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    own = digest(W)
    assert own == digest(W.T.contiguous().T) == digest(W, ALL_THREADS)
    for place in ((0, 0), (350, 299), (699, 599)):
        other = W.clone()
        other[place] = -other[place]
        assert digest(other) != own
    assert digest(W.T) != own != digest(W.float())
