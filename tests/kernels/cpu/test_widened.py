"""The float64 products of a W of any dtype against numpy's, amid memory that must be neither read nor written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inilora_kernels.kernels.cpu.simd import LOADS_FLOAT16, kernel_view
from inilora_kernels.kernels.cpu.widened import COLUMNS, along_columns, along_rows, lines_of

DTYPES = [torch.float32, torch.bfloat16, torch.float64, *([torch.float16] if LOADS_FLOAT16 else [])]
# A sum of at most 600 products, each rounded once, of numbers of about 1.
TOLERANCE = 600 * 2.0**-52 * 10


def _given(length: int, columns: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """X as the products take it, and its columns; what pads a line is never used, so it may be anything."""
    X = np.full((length, *lines_of(columns)), np.nan)
    flat = X.reshape(length, -1)
    flat[:, :columns] = draw.standard_normal((length, columns))
    return X, flat[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 8, 12, 40])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 7), (50, 256), (49, 301), (13, 600)])
def test_both_products(m: int, n: int, columns: int, dtype: torch.dtype) -> None:
    draw = np.random.default_rng(m + n + columns)
    stride, left, top = n + 7, 2, 1
    whole = torch.full((m + 3, stride), float("nan")).to(dtype)
    whole[top : top + m, left : left + n] = torch.from_numpy(draw.standard_normal((m, n))).to(dtype)
    W = whole[top : top + m, left : left + n].double().numpy()
    flat = kernel_view(whole).reshape(-1)[top * stride + left :]

    X, plain = _given(n, columns, draw)
    Y = np.full((m + 2, columns), np.nan)
    for first, last in ((0, m // 2), (m // 2, m)):
        along_rows(flat, stride, first, last, n, X, Y)
    assert np.abs(Y[:m] - W @ plain).max() <= TOLERANCE
    assert np.isnan(Y[m:]).all()

    X, plain = _given(m, columns, draw)
    Y = np.full((columns, n + 3), np.nan)
    for first, last in ((0, n // 3), (n // 3, n)):
        along_columns(flat, stride, m, first, last, X, Y)
    assert np.abs(Y[:, :n] - plain.T @ W).max() <= TOLERANCE
    assert np.isnan(Y[:, n:]).all()


def test_rows_of_x_are_an_odd_number_of_cache_lines() -> None:
    for columns in range(4, 200, 4):
        lines, width = lines_of(columns)
        assert (width, lines % 2) == (COLUMNS, 1)
        assert columns <= lines * width < columns + 2 * COLUMNS
