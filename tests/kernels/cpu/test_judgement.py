"""What Ritz pairs promise, and what a last pass proves, on numbers whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from inilora_kernels.kernels.cpu.judgement import (
    FEW_BEYOND,
    bound_to_reach,
    kept,
    missing,
    next_size,
    promised,
    shortfall,
    sure_values,
    verdict,
)

# ||W||², tolerance, float32's resolution, the unit of a product.
GOAL = (20.0, 1e-8, 2.0**-48, 2.0**-52)
THETA = np.array([9.0, 5.0, 1.0, 0.9, 0.1])
RANKS = np.array([1, 2])


def residuals(size: float) -> np.ndarray:
    return np.full((5, 2), size)


def test_missing_is_the_energy_not_captured() -> None:
    assert missing(THETA, 2, GOAL) == 6.0
    assert missing(THETA, 5, (10.0, *GOAL[1:])) == 0.0


def test_the_bound_to_reach_is_the_first_that_settles_all() -> None:
    bounds = np.array([4.999999, 4.0, 3.0, 2.0])
    assert bound_to_reach(THETA, residuals(1e-6), RANKS, bounds, GOAL) == 4.999999 or (
        promised(THETA, residuals(1e-6), RANKS, 4.999999, GOAL, 0.9, FEW_BEYOND) > 0.9
    )
    found = bound_to_reach(THETA, residuals(1e-4), RANKS, bounds, GOAL)
    assert promised(THETA, residuals(1e-4), RANKS, found, GOAL, 0.9, FEW_BEYOND) <= 0.9
    # Where none does, the last but one.
    assert bound_to_reach(THETA, residuals(0.5), RANKS, bounds, GOAL) == 3.0


def test_vectors_that_belong_together_are_kept_together() -> None:
    """θ_2 and θ_3 are equal but for 1e-9: the gap has to be behind both."""
    theta = np.array([9.0, 5.0, 5.0 - 1e-9, 0.9, 0.1])
    assert kept(theta, residuals(1e-5), np.array([2]), 1.5, GOAL) == 3
    assert kept(THETA, residuals(1e-5), np.array([2]), 1.5, GOAL) == 2


def test_the_next_look_is_where_the_promise_will_be() -> None:
    # A factor of 100 in 20 vectors, then one of 4 in about 6.
    assert next_size(80, 4.0, 60, 400.0, 1.0) == pytest.approx(86.02, abs=0.01)
    assert next_size(80, 4.0, 0, np.inf, 1.0) == pytest.approx(80 * 1.12)
    assert next_size(80, 400.0, 60, 4.0, 1.0) == pytest.approx(80 * 1.12)


def test_sure_values_are_those_whose_residual_is_a_fiftieth() -> None:
    theta = np.array([9.0, 5.0, 1.0, 0.9, -0.1])
    g = np.array([[9.0, 9.0], [0.0, 0.099], [0.015, 0.015], [0.0, 0.019], [0.0, 0.1]])
    assert sure_values(theta, g, 1, 64).tolist() == pytest.approx([5**0.5])
    # A value after one that is not sure might stand in another's place.
    assert sure_values(theta, np.where(np.arange(5)[:, None] == 2, g, 0.0), 1, 64).tolist() == pytest.approx([5**0.5])
    assert sure_values(theta, g / 2, 1, 4).tolist() == pytest.approx([5**0.5, 1.0, 0.9**0.5])
    assert sure_values(theta, g, 5, 64).tolist() == sure_values(theta, g, 2, 1).tolist() == []


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_the_verdict_is_above_what_is_lacking(noise: float) -> None:
    draw = np.random.default_rng(0)
    spectrum = np.array([9.0, 5.0, 1.5, 0.9, 0.1])
    M = np.diag(spectrum)
    X = np.linalg.qr(np.eye(5)[:, :3] + noise * draw.standard_normal((5, 3)))[0]
    form = X.T @ M @ X
    R = M @ X - X @ form
    energy = float(spectrum.sum())
    found = verdict(form, R.T @ R, RANKS, 1.0, (energy, *GOAL[1:]))
    values, vectors, bounds, certified = found
    np.testing.assert_allclose(vectors @ form @ vectors.T, np.diag(values[:2]), atol=1e-13)
    for rank, bound, sure in zip(RANKS, bounds, certified, strict=True):
        lacking = float(spectrum[:rank].sum() - values[:rank].sum())
        assert lacking <= bound + 1e-14
        assert sure == (noise < 1e-4)
    # The sum of the largest eigenvalues of Θ + RᵀR/t is what the bound is.
    gap = values[1] - 1.0
    upper = np.linalg.eigvalsh(form + R.T @ R / gap)[::-1]
    assert shortfall(form, R.T @ R, values, 2, 1.0) == pytest.approx(upper[:2].sum() - values[:2].sum(), abs=1e-13)
    assert shortfall(form, R.T @ R, values, 2, np.inf) == np.inf
