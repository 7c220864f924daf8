"""Both products against float64's, for what fills no block of four and beside memory that must not be read."""

from __future__ import annotations

import numpy as np
import pytest

from inilora_kernels.kernels.cpu.plain_products import add_inner_plain, add_outer_plain


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 5), (4, 8), (7, 33), (13, 100)])
def test_both_products(rows: int, count: int, dtype: type[np.floating]) -> None:
    draw = np.random.default_rng(0)
    stride, top, left, b = count + 9, 2, 3, 8
    W = np.full((top + rows + 2, stride), np.nan, dtype=np.float32)
    W[top : top + rows, left : left + count] = draw.standard_normal((rows, count))
    part = W[top : top + rows, left : left + count].astype(np.float64)
    # Each sum has at most 100 terms, each rounded once.
    units = 100 * float(np.finfo(dtype).eps)

    X = draw.standard_normal((b, stride)).astype(dtype)
    out = np.ones((top + rows + 2, b), dtype=dtype)
    add_inner_plain(W.reshape(-1), stride, top, top + rows, left, count, X, out)
    expected = 1 + part @ X[:, left : left + count].T.astype(np.float64)
    assert np.abs(out[top : top + rows] - expected).max() <= units * np.abs(expected).max()
    assert (out[:top] == 1).all()
    assert (out[top + rows :] == 1).all()

    X = draw.standard_normal((top + rows + 2, b)).astype(dtype)
    out = np.ones((b, stride), dtype=dtype)
    add_outer_plain(W.reshape(-1), stride, top, top + rows, left, count, X, out)
    expected = 1 + X[top : top + rows].T.astype(np.float64) @ part
    assert np.abs(out[:, left : left + count] - expected).max() <= units * np.abs(expected).max()
    assert (out[:, :left] == 1).all()
    assert (out[:, left + count :] == 1).all()
