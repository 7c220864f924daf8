"""Float64 algebra of few long vectors, against float64's own, and to the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.dense import combine, inner, inner_in_parts, residual_gram, turn
from inilora_kernels.kernels.threads import one_torch_thread

# m rows of n, of which s are made: one run of columns, and so many that threads share them.
SHAPES = [(1, 3, 1), (40, 1030, 7), (70, 90, 33), (300, 2100, 64)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(columns, rows, seed=seed)).Q.T.contiguous()


def same_on_all_threads(compute: Callable[[int], Tensor]) -> Tensor:
    with one_torch_thread():
        alone, *shared = (compute(threads) for threads in (1, 2, 3))
    for other in shared:
        assert torch.equal(alone, other)
    return alone


@pytest.mark.parametrize(("m", "n", "s"), SHAPES)
def test_combinations_are_orthonormal_and_span_the_same(m: int, n: int, s: int) -> None:
    rows, weights = orthonormal(m, n).float(), orthonormal(s, m, seed=1)
    X = same_on_all_threads(lambda threads: combine(rows, weights, threads))
    assert float((X @ X.T - torch.eye(s)).abs().max()) < 1e-14
    wanted = weights @ rows.double()
    # Off by no more than what orthonormalizing float32's rows changes, and out of their span by float32's sums of m.
    assert float((X - wanted).abs().max()) < 1e-6
    assert float((wanted - (wanted @ X.T) @ X).abs().max()) < 1e-7
    exact = combine(rows.double(), weights, threads=1)
    assert float((wanted - (wanted @ exact.T) @ exact).abs().max()) < 1e-14


@pytest.mark.parametrize(("m", "n", "s"), SHAPES)
def test_inner_products_residuals_and_turned_rows(m: int, n: int, s: int) -> None:
    left, right, weights, form = normal(m, n), normal(s, n, seed=1), normal(s, m, seed=2), normal(s, s, seed=3)
    # Sums of n products in float64, each rounded once.
    close = {"rtol": 0.0, "atol": 1e-14 * n * 10}
    torch.testing.assert_close(
        same_on_all_threads(lambda threads: inner(left, right, threads)), left @ right.T, **close
    )
    image = normal(s, n, seed=4)
    R = image - form @ right
    grams = same_on_all_threads(lambda threads: residual_gram(right, image, form, threads))
    torch.testing.assert_close(grams, R @ R.T, rtol=1e-12, atol=1e-12 * float(R.square().sum()))

    def turned(threads: int) -> Tensor:
        rows = left.clone()
        found = turn(rows, weights, threads)
        assert found.data_ptr() == rows.data_ptr()
        assert torch.equal(rows[s:], left[s:])
        return found.clone()

    torch.testing.assert_close(same_on_all_threads(turned), weights @ left, **close)


def test_rows_that_are_not_independent_give_nothing() -> None:
    weights = torch.ones(2, 3, dtype=torch.float64)
    assert combine(torch.eye(3, 5), weights, threads=1).isnan().all()


@pytest.mark.parametrize("n", [40, 5000])
def test_inner_products_in_parts_of_stored_rows(n: int) -> None:
    """With themselves and with transposed ones, in one part and in several. Tolerance: float64's sums of n products."""
    random = torch.Generator().manual_seed(0)
    rows, others = torch.randn(20, n, generator=random), torch.randn(n, 20, generator=random, dtype=torch.float64).T
    own, other = inner_in_parts(rows, rows), inner_in_parts(rows, others)
    assert own.dtype == other.dtype == torch.float64
    assert torch.allclose(own, rows.double() @ rows.double().T, rtol=0, atol=1e-11)
    assert torch.allclose(other, rows.double() @ others.T, rtol=0, atol=1e-11)
