"""The smallest singular triplets against a full SVD."""

from __future__ import annotations

import pytest
import torch

from inilora_kernels import approximate
from inilora_kernels.solvers.smallest import minor


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (1, 5), (200, 200), (150, 220)])
def test_minor_triplets(shape: tuple[int, int]) -> None:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rank = min(5, *shape)
    U, S, V = minor(W, rank)
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(S, expected[-rank:], rtol=1e-6, atol=1e-9 * float(expected[0]))
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(V.T @ V, eye, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(W.double() @ V, U * S, rtol=0.0, atol=1e-6 * float(expected[0]))


def test_a_singular_matrix_has_a_null_space() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(80, 20, generator=generator) @ torch.randn(20, 70, generator=generator)
    _, S, V = minor(W, 4)
    assert float(S.max()) <= 1e-6 * float(torch.linalg.matrix_norm(W, ord=2))
    assert float((W.double() @ V).norm()) <= 1e-5 * float(W.norm())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1100, 1100), (1030, 4096)])
def test_large_matrices_are_not_49_to_82_percent_wrong(shape: tuple[int, int]) -> None:
    """MiLoRA above 1,024: an inverse iteration ended after 100 rounds, unconverged, in silence."""
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    expected = (U[:, -8:] * S[-8:]) @ Vh[-8:]
    one = approximate(W, 8, method="milora")
    assert float((one.product().double() - expected).norm()) <= 1e-4 * float(expected.norm())
