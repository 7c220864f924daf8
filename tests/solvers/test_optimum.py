"""f* against a full singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.solvers.optimum import optimum


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
