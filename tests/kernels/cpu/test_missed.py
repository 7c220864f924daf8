"""The bound that a Krylov space gives on λ_max, in float64, where the largest eigenvector hides from its start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.missed import bound_outside

Array = NDArray[np.float64]
N, BLOCK, LEAST = 240, 4, 1.7e-3

# The other eigenvalues of a matrix whose largest is 1.
SPECTRA = {
    "a gap": np.linspace(0.7, 0.0, N - 1),
    "no gap": np.linspace(0.999, 0.0, N - 1),
    "a decay": np.arange(2.0, N + 1) ** -0.4,
    "two values": np.where(np.arange(N - 1) < 100, 0.5, 0.1),
    "one cluster": 0.9 - 0.01 * np.linspace(0.0, 1.0, N - 1),
}


def krylov(values: Array, start: Array, passes: int) -> tuple[Array, Array, Array]:
    """T, what leaves the space, and R of the start, for the diagonal matrix of these values."""
    block, begun = np.linalg.qr(start)
    basis = np.zeros((len(values), 0))
    for _ in range(passes):
        basis = np.hstack([basis, block])
        image = values[:, None] * block
        for _ in range(3):
            image -= basis @ (basis.T @ image)
        block, leaving = np.linalg.qr(image)
        for _ in range(2):
            block -= basis @ (basis.T @ block)
            block, more = np.linalg.qr(block)
            leaving = more @ leaving
    return basis.T @ (values[:, None] * basis), leaving, begun


def size_of_F(T: Array, leaving: Array, begun: Array, at: float) -> float:
    first, last = np.zeros((len(T), BLOCK)), np.zeros((len(T), BLOCK))
    first[:BLOCK], last[-BLOCK:] = begun, leaving.T
    return float(np.linalg.norm(first.T @ np.linalg.solve(at * np.eye(len(T)) - T, last)))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", range(4))
def test_it_holds_where_the_start_has_more_than_the_least_part(spectrum: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    start = random.standard_normal((N, BLOCK))
    start[0] *= 1.01 * LEAST / np.linalg.norm(start[0])
    values = np.concatenate([[1.0], SPECTRA[spectrum]])
    for passes in range(1, 12):
        bound, largest = bound_outside(*krylov(values, start, passes), passes, LEAST)
        assert bound >= 1.0 - 1e-9
        assert largest <= 1.0 + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_least_number_above_which_the_function_is_small(seed: int) -> None:
    values = SPECTRA["a decay"]
    start = np.random.default_rng(seed).standard_normal((len(values), BLOCK))
    for passes in (3, 6, 9):
        parts = krylov(values, start, passes)
        bound, largest = bound_outside(*parts, passes, LEAST)
        assert values[0] <= bound
        grid = bound + (bound - largest) * np.linspace(0.0, 20.0, 400)
        assert max(size_of_F(*parts, at) for at in grid) <= LEAST
        # An interval is a 32nd of its distance long at least.
        assert size_of_F(*parts, largest + 0.85 * (bound - largest)) > LEAST


def test_with_every_pass_it_comes_closer() -> None:
    values = SPECTRA["a decay"]
    start = np.random.default_rng(0).standard_normal((len(values), BLOCK))
    bounds = [bound_outside(*krylov(values, start, passes), passes, LEAST)[0] for passes in range(2, 14)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 1.05 * values[0]


def test_a_start_within_what_is_fixed_bounds_nothing() -> None:
    T, begun = np.diag(np.linspace(1.0, 0.1, 8)), np.eye(BLOCK)
    begun[2, 2] = 0.0
    assert bound_outside(T, np.eye(BLOCK), begun, 2, LEAST)[0] == np.inf


def test_a_space_that_nothing_leaves_knows_its_largest_value() -> None:
    T: Any = np.diag(np.linspace(1.0, 0.1, 8))
    bound, largest = bound_outside(T, np.zeros((BLOCK, BLOCK)), np.eye(BLOCK), 2, LEAST)
    assert largest == pytest.approx(1.0, rel=1e-14)
    assert 1.0 <= bound < 1.0 + 1e-5
    assert bound_outside(0 * T, np.zeros((BLOCK, BLOCK)), np.eye(BLOCK), 2, LEAST) == (0.0, 0.0)
