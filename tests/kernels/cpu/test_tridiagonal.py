"""Full symmetric matrices made tridiagonal, against dense products in float64."""

from __future__ import annotations

import numpy as np
import pytest

from inilora_kernels.kernels.cpu.tridiagonal import times_reflections, tridiagonal, turn_back_from_full

# As in test_eigen.py: off by a few roundings of the largest value for each row.
ROUNDING = 200 * 2.0**-52


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 17, 64, 200])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_tridiagonal_form_is_a_rotation(m: int, zeros: bool) -> None:
    """With rows of zeros, too, whose reflections are none."""
    random = np.random.default_rng(m)
    T = random.uniform(-1, 1, (m, m))
    T = (T + T.T) / 2
    if zeros:
        T[::3], T[:, ::3] = 0.0, 0.0
    form, d, e, betas = T.copy(), np.empty(m), np.empty(m), np.empty(m)
    tridiagonal(form, d, e, betas)
    assert e[-1] == 0.0
    D = np.diag(d) + np.diag(e[:-1], 1) + np.diag(e[:-1], -1)
    H = np.eye(m)
    times_reflections(H, form, betas)
    np.testing.assert_allclose(H @ H.T, np.eye(m), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(H @ D @ H.T, T, rtol=0, atol=m * ROUNDING)
    back = np.eye(m)
    turn_back_from_full(form, betas, back)
    np.testing.assert_allclose(back, H.T, rtol=0, atol=ROUNDING)
