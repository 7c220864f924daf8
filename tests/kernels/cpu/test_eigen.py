"""Eigenvalues and eigenvectors of symmetric matrices, against LAPACK's in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.eigen import decomposed, largest_eigenvalue, leading_pairs, leading_vectors, turn_back

Array = NDArray[np.float64]
# Both decompositions are off by a few roundings of the largest value for each row; the largest case has 200.
ROUNDING = 200 * 2.0**-52

SPECTRA: dict[str, Callable[[int], Array]] = {
    "apart": lambda m: np.linspace(1.0, 2.0, m),
    "of both signs": lambda m: np.linspace(-1.0, 1.0, m),
    "falling": lambda m: np.logspace(0, -30, m),
    "rising": lambda m: np.logspace(-30, 0, m),
    "three clusters": lambda m: np.sort(np.resize([1.0, 0.5, 0.1], m)),
    "nearly equal": lambda m: 1 + 1e-12 * np.arange(m),
    "one": lambda m: np.eye(m)[0],
    "none": lambda m: np.zeros(m),
    "huge": lambda m: 1e300 * np.linspace(0.1, 1, m),
    "tiny": lambda m: 1e-310 * np.linspace(0.1, 1, m),
}


def with_eigenvalues(values: Array, rotated: bool) -> Array:
    if not rotated:
        return np.diag(values)
    m = len(values)
    Q = np.linalg.qr(np.random.default_rng(m).standard_normal((m, m)))[0]
    T = (Q * values) @ Q.T
    return (T + T.T) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("m", [1, 2, 3, 33, 200])
def test_all_pairs(m: int, name: str, rotated: bool) -> None:
    T = with_eigenvalues(SPECTRA[name](m), rotated)
    size = max(float(np.abs(T).max()), 1e-320)
    values, vectors, reduced, converged = decomposed(T.copy(), np.eye(m), 0.0)
    assert converged
    assert np.abs(values / size - np.linalg.eigvalsh(T)[::-1] / size).max() <= ROUNDING * m
    assert largest_eigenvalue(T) == values[0]
    require_eigenvectors(T / size, values / size, vectors)
    values, some, converged = leading_pairs(T, max(1, m // 2))
    assert converged
    require_eigenvectors(T / size, values[: len(some)] / size, some)
    alone = np.empty((max(1, m // 3), m))
    if leading_vectors(reduced, values, alone):
        turn_back(reduced, alone)
        require_eigenvectors(T / size, values[: len(alone)] / size, alone)


def require_eigenvectors(T: Array, values: Array, vectors: Array) -> None:
    assert np.abs(vectors @ T - values[:, None] * vectors).max() <= ROUNDING * len(T)
    # Between values that are no cluster, inverse iteration makes them so; the nearest are 1e-3 of the largest apart.
    assert np.abs(vectors @ vectors.T - np.eye(len(vectors))).max() <= 1e3 * ROUNDING


def test_rows_times_the_eigenvectors() -> None:
    T = with_eigenvalues(SPECTRA["apart"](40), rotated=True)
    rows = np.random.default_rng(0).standard_normal((4, 40))
    _, vectors, _, _ = decomposed(T.copy(), np.eye(40), 0.0)
    _, g, _, _ = decomposed(T, rows, 0.0)
    np.testing.assert_allclose(g, vectors @ rows.T, rtol=0.0, atol=1e-13)


def test_a_low_rank_matrix_whose_rounding_is_its_smallest_values() -> None:
    """QL from the large end would take 40 steps for one of them and not have it."""
    W = np.random.default_rng(0).standard_normal((100, 5)) @ np.random.default_rng(1).standard_normal((5, 90))
    values, vectors, converged = leading_pairs(W.T @ W, 64)
    assert converged
    np.testing.assert_allclose(values[:5], np.linalg.svd(W)[1][:5] ** 2, rtol=1e-12)
    require_eigenvectors(W.T @ W / values[0], values[:64] / values[0], vectors)


def test_no_numbers_do_not_hang() -> None:
    assert np.isnan(largest_eigenvalue(np.full((5, 5), np.nan)))
