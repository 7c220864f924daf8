"""The least bound at which a Schur complement is positive definite, against eigenvalues in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.outside import least_outside, least_shortfall, shortfall_without_eigenvalues

Array = NDArray[np.float64]


def parts(m: int, b: int, size: float, seed: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    theta = np.sort(draw.uniform(0.1, 1.0, m))[::-1].copy()
    return theta, size * draw.standard_normal((m, b)) * np.linspace(0.0, 1.0, m)[:, None] ** 4


def smallest_eigenvalue(theta: Array, g: Array, kept: int, bound: float, missed: float) -> float:
    form = (bound - missed) * np.eye(g.shape[1]) - (g[kept:].T / (bound - theta[kept:])) @ g[kept:]
    return float(np.linalg.eigvalsh(form)[0])


@pytest.mark.parametrize("size", [1e-8, 1e-3, 0.3])
@pytest.mark.parametrize(("m", "b"), [(9, 1), (60, 4), (90, 8), (30, 13)])
def test_the_least_bound(m: int, b: int, size: float) -> None:
    theta, g = parts(m, b, size, seed=m)
    for kept in (0, 3, m - 1):
        for missed in (0.05, float(theta[kept]) * 1.01):
            bound = least_outside(theta, g, kept, missed)
            assert bound >= max(missed, theta[kept])
            assert smallest_eigenvalue(theta, g, kept, bound, missed) >= -1e-12
            low = max(missed, float(theta[kept]))
            step = 1.01 * float(np.linalg.norm(g[kept:])) / 512 + 2e-6 * low
            below = bound - step
            if below > low:
                assert smallest_eigenvalue(theta, g, kept, below, missed) < 0


def test_nothing_beyond_the_space() -> None:
    theta, g = parts(5, 2, 0.1, seed=0)
    assert least_outside(theta, g, 5, 0.4) == 0.4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-2])
def test_the_shortfall_without_eigenvalues(size: float, tied: bool) -> None:
    """Never below the sum of the largest eigenvalues of Θ + P, and close to it."""
    theta, g = parts(20, 4, size, seed=3)
    rank, gap, noise = 4, 0.05, 1e-5
    if tied:
        theta[rank] = theta[rank - 1]
    for kept in (4, 5, 9, 14):
        P = (g[:kept] @ g[:kept].T + noise**2 * np.eye(kept)) / gap
        true = float(np.linalg.eigvalsh(np.diag(theta[:kept]) + P)[-rank:].sum() - theta[:rank].sum())
        ties = true / rank + noise**2 / gap
        found = [shortfall_without_eigenvalues(theta, g, rank, kept, gap, noise, above) for above in (0.0, ties)]
        # Eigenvalues near 1 are rounded to 2⁻⁵², some of them added.
        assert min(found) >= true - 1e-14
        assert min(found) <= 3.1 * true or size > 1e-3
        assert np.isfinite(found[0]) == (kept == rank or not tied)


def test_the_least_shortfall_is_that_of_one_of_the_numbers() -> None:
    theta, g = parts(40, 4, 1e-3, seed=1)
    rank, missed, rounding, noise = 3, 0.5, 1e-7, 1e-8
    candidates = np.array([3, 4, 5, 7, 40])
    best, kept, outside = least_shortfall(theta, g, rank, candidates, missed, rounding, noise, 0.0)
    assert kept in candidates
    assert outside == least_outside(theta, g, kept, missed) + rounding
    gap = float(theta[rank - 1]) - outside
    assert best == shortfall_without_eigenvalues(theta, g, rank, kept, gap, noise, 0.0)
    enough, first, _ = least_shortfall(theta, g, rank, candidates, missed, rounding, noise, 1.0)
    assert (enough >= best, first) == (True, 3)
    # Nothing is proven where what was missed may be as large as θ_r.
    assert least_shortfall(theta, g, rank, candidates, float(theta[2]), rounding, noise, 1.0)[0] == np.inf
