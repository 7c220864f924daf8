"""f* against a full singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.solvers.krylov import principal
from inilora_kernels.solvers.optimum import loss_near, optimum


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 60), k=st.integers(1, 60), rank=st.integers(1, 60), seed=st.integers(0, 9))
def test_optimum_is_the_tail_of_the_singular_values(d: int, k: int, rank: int, seed: int) -> None:
    rank = min(rank, d, k)
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(seed))
    squares = torch.linalg.svdvals(W.double()).square()
    found = optimum(W, rank)
    # Rounding of the Gram matrix's float64 entries, against the largest of them.
    assert found.loss == pytest.approx(float(squares[rank:].sum()), rel=1e-12, abs=1e-12 * float(squares.sum()))
    assert found.energy == pytest.approx(float(squares.sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_optimum_of_other_dtypes_is_that_of_their_values(dtype: torch.dtype) -> None:
    W = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    squares = torch.linalg.svdvals(W.double()).square()
    assert optimum(W, 5).loss == pytest.approx(float(squares[5:].sum()), rel=1e-12)


def test_an_exactly_low_rank_matrix_has_an_optimum_of_zero_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(50, 3, generator=generator).double() @ torch.randn(3, 70, generator=generator).double()
    found = optimum(W, 3)
    assert 0 <= found.loss <= 1e-13 * found.energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 400), (400, 700), (200, 90)])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_loss_of_factors_without_reading_the_matrix(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
    """Against the float64 residual; balanced factors and a rotation of them, both rounded to float32."""
    generator = torch.Generator().manual_seed(rank)
    W = (torch.randn(shape, generator=generator) / torch.arange(1, shape[1] + 1) ** 0.3).to(dtype)
    found = principal(W, [rank])
    turned = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
    for C in (torch.eye(rank, dtype=torch.float64), turned):
        A = (C @ (found.V * found.S.sqrt()).T).float()
        B = ((found.U * found.S.sqrt()) @ C.T).float()
        loss = float((W.double() - B.double() @ A.double()).square().sum())
        # The docstring's 10⁻¹¹ of ||W||² is for the worst signs of all roundings.
        assert loss_near(found, rank, A, B) == pytest.approx(loss, rel=1e-11)


def test_the_loss_is_read_where_it_is_small_or_the_factors_are_others() -> None:
    low = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) @ torch.randn(8, 200)
    found = principal(low, [8])
    A, B = (found.V * found.S).T.float(), found.U.float()
    assert loss_near(found, 8, A, B) is None
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    found = principal(W, [8])
    A, B = (found.V * found.S).T.float(), found.U.float()
    assert loss_near(found, 8, A, B) is not None
    assert loss_near(found, 8, 1.001 * A, B) is None
