"""The two products on rows in place, against float64, with NaN around all that they may read."""

from __future__ import annotations

from collections.abc import Callable

import numba
import pytest
import torch

from inilora_kernels.kernels.cpu.in_place import WIDE_LANES, WIDE_ROWS, WIDE_VECTORS, inner_runs, outer_runs
from inilora_kernels.kernels.cpu.simd import LANES, LOADS_FLOAT16, SMALL_GROUP, kernel_view

# What is fetched ahead may lie anywhere, outside of the array too.
AHEAD = 1 << 40
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if LOADS_FLOAT16 else [])]
# W's dtype, that of the sums, and how many of these a vector holds.
KINDS = [(dtype, torch.float32, LANES) for dtype in DTYPES]
KINDS += [(dtype, torch.float64, WIDE_LANES) for dtype in [*DTYPES, torch.float64]]
# A sum of a few hundred products, each rounded once.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-12}


@numba.njit
def inner(out, W, X, stride, runs):  # type: ignore[no-untyped-def]
    inner_runs(out, 5, SMALL_GROUP, W, 3, stride, X, 7, stride, runs, AHEAD)


@numba.njit
def outer_by_one(out, X, W, stride, count):  # type: ignore[no-untyped-def]
    outer_runs(out, 5, stride, X, 7, SMALL_GROUP, W, 3, stride, count, AHEAD, 1)


@numba.njit
def outer_by_many(out, X, W, stride, count):  # type: ignore[no-untyped-def]
    outer_runs(out, 5, stride, X, 7, SMALL_GROUP, W, 3, stride, count, AHEAD, WIDE_VECTORS)


def amid_nan(rows: int, columns: int, stride: int, first: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat memory with NaN everywhere but in the matrix's rows, and the matrix."""
    memory = torch.full((first + rows * stride + 9,), float("nan"), dtype=dtype)
    matrix = memory.as_strided((rows, columns), (stride, 1), first)
    matrix.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    return memory, matrix


@pytest.mark.parametrize(("dtype", "kind", "lanes"), KINDS)
def test_inner_products_of_runs(dtype: torch.dtype, kind: torch.dtype, lanes: int) -> None:
    columns = 17 * lanes
    stride = columns + 11
    (W_memory, W), (X_memory, X) = (
        amid_nan(WIDE_ROWS, columns, stride, 3, dtype),
        amid_nan(SMALL_GROUP, columns, stride, 7, kind),
    )
    out = torch.ones(5 + WIDE_ROWS * SMALL_GROUP + 5, dtype=kind)
    inner(out.numpy(), kernel_view(W_memory), X_memory.numpy(), stride, 17)
    expected = torch.ones(len(out), dtype=torch.float64)
    expected[5:-5] += (W.double() @ X.double().T).flatten()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ROUNDING[kind])


@pytest.mark.parametrize(("outer", "vectors"), [(outer_by_one, 1), (outer_by_many, WIDE_VECTORS)])
@pytest.mark.parametrize(("dtype", "kind", "lanes"), KINDS)
def test_outer_products_of_a_run(
    dtype: torch.dtype, kind: torch.dtype, lanes: int, outer: Callable[..., None], vectors: int
) -> None:
    columns, count = lanes * vectors, 7
    stride = columns + 11
    (W_memory, W), (X_memory, X) = (
        amid_nan(count, columns, stride, 3, dtype),
        amid_nan(count, SMALL_GROUP, SMALL_GROUP, 7, kind),
    )
    out = torch.ones(5 + SMALL_GROUP * stride, dtype=kind)
    outer(out.numpy(), X_memory.numpy(), kernel_view(W_memory), stride, count)
    expected = torch.ones(len(out), dtype=torch.float64)
    expected.as_strided((SMALL_GROUP, columns), (stride, 1), 5).add_(X.double().T @ W.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ROUNDING[kind] / 10)
