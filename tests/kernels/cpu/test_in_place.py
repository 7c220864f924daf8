"""The two products on rows in place, against float64, with NaN around all that they may read."""

from __future__ import annotations

import numba
import pytest
import torch

from inilora_kernels.kernels.cpu.in_place import RUN, WIDE_ROWS, WIDE_VECTORS, inner_runs
from inilora_kernels.kernels.cpu.simd import LANES, LOADS_FLOAT16, SMALL_GROUP, kernel_view, outer_products

DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if LOADS_FLOAT16 else [])]


@numba.njit
def inner(out, W, X, stride, runs):  # type: ignore[no-untyped-def]
    inner_runs(out, 5, SMALL_GROUP, W, 3, stride, X, 7, stride, runs)


@numba.njit
def outer(out, X, W, stride, count):  # type: ignore[no-untyped-def]
    outer_products(out, 5, stride, X, 7, SMALL_GROUP, 1, W, 3, stride, count, SMALL_GROUP, LANES, WIDE_VECTORS)


def amid_nan(rows: int, columns: int, stride: int, first: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat memory with NaN everywhere but in the matrix's rows, and the matrix."""
    memory = torch.full((first + rows * stride + 9,), float("nan"), dtype=dtype)
    matrix = memory.as_strided((rows, columns), (stride, 1), first)
    matrix.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    return memory, matrix


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_products_of_runs(dtype: torch.dtype) -> None:
    stride = 3 * RUN + 11
    (W_memory, W), (X_memory, X) = (
        amid_nan(WIDE_ROWS, 3 * RUN, stride, 3, dtype),
        amid_nan(SMALL_GROUP, 3 * RUN, stride, 7, torch.float32),
    )
    out = torch.ones(5 + WIDE_ROWS * SMALL_GROUP + 5)
    inner(out.numpy(), kernel_view(W_memory), X_memory.numpy(), stride, 3)
    expected = torch.ones(len(out), dtype=torch.float64)
    expected[5:-5] += (W.double() @ X.double().T).flatten()
    # Sums of 3·RUN products in float32, each rounded once.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_products_of_a_run(dtype: torch.dtype) -> None:
    stride, count = RUN + 11, 7
    (W_memory, W), (X_memory, X) = (
        amid_nan(count, RUN, stride, 3, dtype),
        amid_nan(count, SMALL_GROUP, SMALL_GROUP, 7, torch.float32),
    )
    out = torch.ones(5 + SMALL_GROUP * stride)
    outer(out.numpy(), X_memory.numpy(), kernel_view(W_memory), stride, count)
    expected = torch.ones(len(out), dtype=torch.float64)
    expected.as_strided((SMALL_GROUP, RUN), (stride, 1), 5).add_(X.double().T @ W.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
