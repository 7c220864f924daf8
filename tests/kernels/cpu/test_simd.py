"""Each intrinsic on its own against numpy in float64, between NaN that a read or write out of bounds would meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.simd import (
    GROUP,
    LANES,
    LOADS_FLOAT16,
    PANEL,
    ROWS,
    SMALL_GROUP,
    VECTORS,
    atomic_add,
    entry,
    give_way,
    inner_products,
    kernel_view,
    outer_products,
    spin_pause,
)

DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if LOADS_FLOAT16 else [])]
COUNT, PANELS, MARGIN = 7, 3, 5
# A sum of n float32 products, each rounded at most twice, from operands of order 1.
ERROR = 2 * COUNT * PANEL * 2.0**-24


def among_nan(values: torch.Tensor) -> tuple[torch.Tensor, NDArray[Any]]:
    """The values, flat, from element MARGIN on in a buffer of NaN; and the same memory as the kernels take it."""
    whole = torch.full((values.numel() + 2 * MARGIN,), float("nan"), dtype=values.dtype)
    whole[MARGIN:-MARGIN] = values.flatten()
    return whole, kernel_view(whole)


def check(whole: torch.Tensor, expected: torch.Tensor) -> None:
    assert bool(torch.isnan(whole[:MARGIN]).all())
    assert bool(torch.isnan(whole[-MARGIN:]).all())
    assert float((whole[MARGIN:-MARGIN].view(expected.shape).double() - expected).abs().max()) < ERROR


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@njit
def outer_wide(out: Any, x: Any, W: Any, count: int) -> None:
    outer_products(out, 5, PANEL, x, 5, GROUP, 1, W, 5, PANEL, count, GROUP, LANES, VECTORS)


@njit
def outer_transposed(out: Any, x: Any, W: Any, count: int) -> None:
    outer_products(out, 5, GROUP, x, 5, 1, 7, W, 5, GROUP, count, ROWS, GROUP, 1)


@njit
def inner_wide(out: Any, W: Any, A: Any, panels: int) -> None:
    inner_products(out, 5, GROUP, W, 5, ROWS * PANEL, A, 5, GROUP * PANEL, panels, ROWS, GROUP)


@njit
def inner_small(out: Any, W: Any, A: Any, panels: int) -> None:
    inner_products(out, 5, SMALL_GROUP, W, 5, 2 * PANEL, A, 5, SMALL_GROUP * PANEL, panels, 2, SMALL_GROUP)


@njit
def every_entry(out: Any, W: Any) -> None:
    for i in range(len(W)):
        out[i] = entry(W, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_products_of_a_panel(dtype: torch.dtype) -> None:
    W, x, before = normal(COUNT, PANEL, dtype=dtype), normal(COUNT, GROUP), normal(GROUP, PANEL)
    whole, out = among_nan(before)
    outer_wide(out, among_nan(x)[1], among_nan(W)[1], COUNT)
    check(whole, before.double() + x.double().T @ W.double())


def test_outer_products_with_a_transposed_factor() -> None:
    """The scalars of x stand a row of seven apart, and a vector holds one group of ranks."""
    W, x, before = normal(COUNT, GROUP), normal(ROWS, COUNT), normal(ROWS, GROUP)
    whole, out = among_nan(before)
    outer_transposed(out, among_nan(x)[1], among_nan(W)[1], COUNT)
    check(whole, before.double() + x.double() @ W.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "rows", "group"), [(inner_wide, ROWS, GROUP), (inner_small, 2, SMALL_GROUP)])
def test_inner_products(kernel: Any, rows: int, group: int, dtype: torch.dtype) -> None:
    W, A, before = normal(PANELS, rows, PANEL, dtype=dtype), normal(PANELS, group, PANEL), normal(rows, group)
    whole, out = among_nan(before)
    kernel(out, among_nan(W)[1], among_nan(A)[1], PANELS)
    check(whole, before.double() + torch.einsum("nij,npj->ip", W.double(), A.double()))


def test_products_of_no_terms_leave_what_is_there() -> None:
    before = normal(GROUP, PANEL)
    whole, out = among_nan(before)
    outer_wide(out, among_nan(normal(1, GROUP))[1], among_nan(normal(1, PANEL))[1], 0)
    check(whole, before.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_exact_in_float32(dtype: torch.dtype) -> None:
    W = torch.cat([normal(500, dtype=dtype), torch.tensor([0.0, -0.0, 1e-40, float("inf"), -float("inf")]).to(dtype)])
    out = torch.empty(len(W))
    every_entry(out.numpy(), kernel_view(W))
    assert torch.equal(out, W.float())


def test_float16_beyond_its_normal_range_is_widened_exactly() -> None:
    if not LOADS_FLOAT16:
        pytest.skip("this processor has no float16 conversion")
    W = torch.zeros(1, PANEL, dtype=torch.float16)
    W[0, :5] = torch.tensor([2.0**-24, 65504.0, -(2.0**-14), 0.0, float("inf")])
    x = torch.zeros(1, GROUP)
    x[0, 0] = 1.0
    out = np.zeros(GROUP * PANEL + 10, np.float32)
    outer_wide(out, among_nan(x)[1], among_nan(W)[1], 1)
    assert np.array_equal(out[5 : 5 + PANEL], W[0].float().numpy())


@njit
def counted(counter: Any, amounts: Any, before: Any) -> None:
    for i in range(amounts.size):
        before[i] = atomic_add(counter, 2, amounts[i])
        spin_pause()
        give_way()


def test_atomic_add_returns_what_was_there() -> None:
    counter, before = np.zeros(4, np.int64), np.empty(3, np.int64)
    counted(counter, np.array([5, -2, 2**40]), before)
    assert before.tolist() == [0, 5, 3]
    assert counter.tolist() == [0, 0, 2**40 + 3, 0]
