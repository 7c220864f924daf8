"""The bound on |F| about a point, against F itself at many others."""

from __future__ import annotations

import numpy as np
import pytest

from inilora_kernels.kernels.cpu.poles import largest_about, numerators, square


@pytest.mark.parametrize("share", [1e-3, 1e-9])
@pytest.mark.parametrize("reach", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_and_is_near(seed: int, reach: float, share: float) -> None:
    random = np.random.default_rng(seed)
    theta = np.sort(random.uniform(0.0, 1.0, 30))[::-1].copy()
    rho, g = random.standard_normal((30, 4)), random.standard_normal((30, 3)) * 1e-3
    middle = 1.5
    radius = reach * (middle - theta[0])
    bound = largest_about(theta, numerators(rho, g), middle, radius, share, 1e9)

    def size(at: float) -> float:
        return float(np.linalg.norm(np.einsum("kb,kc,k->bc", rho, g, 1 / (at - theta))))

    sizes = [size(at) for at in np.linspace(middle - radius, middle + radius, 201)]
    assert max(sizes) <= bound * (1 + 1e-12)
    # The series' terms are added without their signs: it is no larger than with all of them alike.
    most = sum(np.linalg.norm(rho[k]) * np.linalg.norm(g[k]) / (middle - radius - theta[k]) for k in range(30))
    assert bound <= most + share


def test_it_is_given_up_once_it_is_too_large() -> None:
    theta, terms = np.array([0.5]), numerators(np.ones((1, 2)), np.ones((1, 2)))
    assert largest_about(theta, terms, 1.0, 0.1, 1e-6, 1e9) < np.inf
    assert largest_about(theta, terms, 1.0, 0.1, 1e-6, 0.1) == np.inf


def test_numerators_and_their_norms() -> None:
    rho, g = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    products, norms = numerators(rho, g)
    np.testing.assert_array_equal(products, [[3.0, 4.0, 6.0, 8.0]])
    assert norms[0] == pytest.approx(5 * 5**0.5)
    assert square(g[0]) == 25.0
