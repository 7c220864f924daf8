"""The least bound at which a Schur complement is positive definite, against eigenvalues in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from inilora_kernels.kernels.cpu.outside import least_outside, outside_below

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


def test_outside_for_each_number_kept() -> None:
    theta, g = parts(40, 4, 0.2, seed=1)
    highest, missed, kept = float(theta[2]), 0.5, np.arange(3, 40)
    found = outside_below(theta, g, kept, highest, missed)
    for one, bound in zip(kept, found, strict=True):
        assert np.isfinite(bound) == (smallest_eigenvalue(theta, g, int(one), highest, missed) > 0)
        assert not np.isfinite(bound) or bound == least_outside(theta, g, int(one), missed)
    assert 0 < np.isfinite(found).sum() < len(found)
    # θ itself is no bound.
    assert outside_below(theta, g, np.array([2]), highest, missed)[0] == np.inf
