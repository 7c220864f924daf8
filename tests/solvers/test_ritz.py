"""Ritz pairs of a projected matrix, also where the compiled eigensolver gives up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inilora_kernels.kernels.cpu import eigen
from inilora_kernels.solvers.ritz import RitzPairs, largest_eigenvalue, ritz_pairs


def projected(m: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m)
    T = torch.randn(m, m, generator=generator, dtype=torch.float64)
    return T @ T.T, torch.randn(4, m, generator=generator, dtype=torch.float64)


def require_pairs(pairs: RitzPairs, T: torch.Tensor, leaving: torch.Tensor) -> None:
    values, vectors = torch.linalg.eigh(T)
    np.testing.assert_allclose(pairs.theta, values.flip(0), rtol=1e-12, atol=1e-12)
    found = pairs.vectors(7)
    torch.testing.assert_close((found @ vectors.flip(1)[:, :7]).abs(), torch.eye(7).double(), rtol=0.0, atol=1e-10)
    np.testing.assert_allclose(abs(pairs.g[:7]), (found @ leaving.T).abs(), rtol=0.0, atol=1e-10)


def test_they_are_lapacks() -> None:
    T, leaving = projected()
    require_pairs(ritz_pairs(T, leaving), T, leaving)
    assert largest_eigenvalue(T) == pytest.approx(float(torch.linalg.eigvalsh(T)[-1]), rel=1e-13)


def test_lapack_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    T, leaving = projected()
    with monkeypatch.context() as patch:
        patch.setattr(eigen, "leading_vectors", lambda *arguments: False)
        require_pairs(ritz_pairs(T, leaving), T, leaving)
    with monkeypatch.context() as patch:
        patch.setattr(eigen, "decomposed", lambda *arguments: (None, None, None, False))
        patch.setattr(eigen, "largest_eigenvalue", lambda T: float("nan"))
        require_pairs(ritz_pairs(T, leaving), T, leaving)
        assert largest_eigenvalue(T) == float(torch.linalg.eigvalsh(T)[-1])
