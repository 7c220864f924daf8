"""Banded matrices made tridiagonal, against LAPACK's eigenvalues and dense products in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.band import (
    WIDTH,
    far_from_diagonal,
    reflections,
    tridiagonal_of_band,
    turn_back_from_band,
)
from inilora_kernels.kernels.cpu.eigen import decomposed

Array = NDArray[np.float64]
UNIT = 2.0**-23
# As in test_eigen.py: both are off by a few roundings of the largest value for each row.
ROUNDING = 300 * 2.0**-52


def banded(m: int, width: int, seed: int = 0) -> Array:
    """A symmetric matrix of entries of at most 1 with so many diagonals on either side of the main one."""
    random = np.random.default_rng(seed)
    T = np.tril(np.triu(random.uniform(-1, 1, (m, m)), -width), width)
    return (T + T.T) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [0, 1, 3, WIDTH])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 10, 17, 100, 300])
@pytest.mark.parametrize("columns", [0, 3, 16])
def test_the_tridiagonal_form_is_a_rotation_of_the_band(m: int, width: int, columns: int) -> None:
    T = banded(m, width)
    d, e, v = np.empty(m), np.empty(m), np.empty((reflections(m), WIDTH))
    betas, rows = np.empty(len(v)), np.random.default_rng(1).standard_normal((m, columns))
    turned = rows.copy()
    before = T.copy()
    tridiagonal_of_band(T, d, e, v, betas, turned)
    np.testing.assert_array_equal(T, before)
    assert e[-1] == 0.0
    D = np.diag(d) + np.diag(e[:-1], 1) + np.diag(e[:-1], -1)
    # The rows of the identity, turned back, are the rows of Hᵀ: T = HDHᵀ, and the rows given became Hᵀ times them.
    H = np.eye(m)
    turn_back_from_band(v, betas, H)
    np.testing.assert_allclose(H @ H.T, np.eye(m), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(H.T @ D @ H, T, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(H @ rows, turned, rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e-200, 1e200])
def test_rounding_far_from_the_diagonal_counts_as_zero_and_more_does_not(scale: float) -> None:
    m = 120
    T = banded(m, WIDTH)
    far = np.random.default_rng(2).standard_normal((m, m))
    far = np.triu(far, WIDTH + 1) + np.triu(far, WIDTH + 1).T
    assert far_from_diagonal(T) == 0.0
    assert far_from_diagonal(T + far) == pytest.approx(float(np.linalg.norm(far)), rel=1e-12)
    far *= UNIT * np.sqrt(m) / np.linalg.norm(far)
    for size, zero in ((1.0, True), (20.0, False)):
        whole = T + size * far
        theta, vectors, reduced, converged = decomposed(scale * whole, np.eye(m), UNIT)
        assert converged
        assert reduced[-1] == zero
        seen = T if zero else whole
        # A number of 1e-310 has 33 bits.
        allowed = ROUNDING * m if scale > 1e-300 else 2.0**-30
        assert np.abs(theta / scale - np.linalg.eigvalsh(seen)[::-1]).max() <= allowed
        assert np.abs(vectors @ seen - theta[:, None] / scale * vectors).max() <= allowed


def test_without_a_unit_only_zero_is_zero() -> None:
    T = banded(60, WIDTH)
    assert decomposed(T.copy(), np.empty((0, 60)), 0.0)[2][-1]
    T[0, 59] = T[59, 0] = 1e-30
    assert not decomposed(T, np.empty((0, 60)), 0.0)[2][-1]
