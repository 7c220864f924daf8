"""The count of eigenvalues above some μ, in float64, also where eigenvectors hide from the space's start."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.counting import counted, level, next_count
from inilora_kernels.kernels.cpu.eigen import decomposed
from inilora_kernels.solvers.certificate import least_of_pairs

from .test_missed import krylov

Array = NDArray[np.float64]
N, BLOCK, RANK = 240, 4, 6
LEAST = least_of_pairs(BLOCK, RANK + 4)
RANKS = np.array([2, RANK])

ORDERS = np.arange(1.0, N + 1)
SPECTRA = {
    "a decay": ORDERS**-0.6,
    "a gap": np.where(ORDERS <= RANK, 2.0 - 0.1 * ORDERS, 0.5 * ORDERS**-0.3),
    "pairs": np.ceil(ORDERS / 2) ** -0.6,
    "nearly pairs": np.ceil(ORDERS / 2) ** -0.6 * (1 - 1e-9 * (ORDERS % 2 == 0)),
    "a cluster across r": np.where(ORDERS <= RANK + 2, 1.0 - 1e-7 * ORDERS, 0.5 * ORDERS**-0.3),
}


def ritz(values: Array, start: Array, passes: int) -> tuple[Array, Array, Array]:
    """θ, g and ρ of a space of the diagonal matrix of these values."""
    T, leaving, begun = krylov(values, start, passes)
    rows = np.zeros((2 * BLOCK, len(T)))
    rows[:BLOCK, -BLOCK:], rows[BLOCK:, :BLOCK] = leaving, begun.T
    theta, both, _, converged = decomposed(T, rows, 0.0)
    assert converged
    return theta, both[:, :BLOCK].copy(), both[:, BLOCK:].copy()


def goal(values: Array) -> tuple[float, float, float, float]:
    return float(values.sum()), 1e-8, 2.0**-48, 2.0**-52


def hiding(seed: int, place: int, length: float) -> Array:
    """A start that has only so much along one of the eigenvectors, whatever plane that is seen in."""
    random = np.random.default_rng(seed)
    start = random.standard_normal((N, BLOCK))
    before = start[place - 1] / np.linalg.norm(start[place - 1])
    start[place] -= (start[place] @ before) * before
    start[place] *= length / np.linalg.norm(start[place])
    return start


def proven_at(values: Array, start: Array) -> int:
    """The passes at which the count first proves the ranks; what it says is checked at every one of them."""
    first = 0
    for passes in range(3, N // BLOCK - 8):
        theta, g, rho = ritz(values, start, passes)
        kept, outside, bound = counted(theta, g, rho, RANKS, goal(values), LEAST)
        if kept == 0:
            assert bound > 1.0
            continue
        first = first or passes
        # c' holds for the complement of the leading Ritz vectors, and M has `kept` larger eigenvalues.
        assert np.sort(values)[::-1][kept] <= outside < theta[RANK - 1]
        assert abs(theta[:kept] - np.sort(values)[::-1][:kept]).max() < 1e-4
    return first


@pytest.mark.parametrize("spectrum", ["a decay", "a gap"])
@pytest.mark.parametrize("place", [1, 3, RANK - 1])
def test_it_waits_for_an_eigenvector_that_hides_down_to_the_last_allowed_bit(spectrum: str, place: int) -> None:
    values = SPECTRA[spectrum]
    hidden = proven_at(values, hiding(0, place, 1.01 * 2**0.5 * LEAST))
    assert hidden >= proven_at(values, np.random.default_rng(0).standard_normal((N, BLOCK))) > 0


@pytest.mark.parametrize("spectrum", ["pairs", "nearly pairs", "a cluster across r"])
@pytest.mark.parametrize("seed", range(3))
def test_values_that_are_equal_or_nearly_are_not_counted_wrong(spectrum: str, seed: int) -> None:
    values = SPECTRA[spectrum]
    proven_at(values, np.random.default_rng(seed).standard_normal((N, BLOCK)))
    proven_at(values, hiding(seed, 1, 1.01 * 2**0.5 * LEAST))


def test_what_the_start_has_nothing_of_is_why_it_has_to_be_drawn() -> None:
    """Without its condition the count is wrong, so that the tests above can fail."""
    values, start = SPECTRA["a decay"], np.random.default_rng(0).standard_normal((N, BLOCK))
    start[2] = 0.0
    theta, g, rho = ritz(values, start, 30)
    kept, outside, _ = counted(theta, g, rho, RANKS, goal(values), LEAST)
    assert kept > 0
    assert outside < values[2] or abs(theta[:kept] - values[:kept]).max() > 1e-4


@pytest.mark.parametrize("passes", [12, 18, 24])
def test_the_level_is_above_the_function_in_every_cell(passes: int) -> None:
    values = SPECTRA["a decay"]
    theta, g, rho = ritz(values, np.random.default_rng(passes).standard_normal((N, BLOCK)), passes)
    mu, highest = 0.1 * theta[RANK] + 0.9 * theta[RANK - 1], float(values.sum())
    found = level(theta, g, rho, RANK, mu, highest, LEAST)
    worst = 0.0
    for at in np.concatenate([np.linspace(mu, theta[0], 2000)[:-1], np.geomspace(theta[0], highest, 100)[1:]]):
        terms = rho[:, :, None] * g[:, None, :] / (at - theta)[:, None, None]
        worst = max(worst, min(float(np.linalg.norm(terms.sum(0) - terms[k], 2)) for k in range(RANK)))
    # The rest of a Taylor series is a fiftieth of ε at most.
    assert worst <= found < 20 * worst + 0.02 * LEAST


def test_the_next_look_is_where_the_bound_will_be_small_enough() -> None:
    # A factor of 4 in 4 vectors, and the same once more.
    assert next_count(80, 4, 4.0, 76, 16.0) == pytest.approx(84.0)
    # Nothing known: by e with each pass.
    assert next_count(80, 4, np.e**2, 0, np.inf) == pytest.approx(88.0)
    assert next_count(80, 4, np.inf, 0, np.inf) == pytest.approx(80 * 1.12)
    # What does not fall, or too slowly, is for a second space.
    assert next_count(80, 4, np.inf, 70, np.inf) == next_count(80, 4, 4.0, 76, 4.0) == 0.0
    assert next_count(80, 4, 1e3, 70, 1.1e3) == 0.0
