"""Weights at the ends of float32."""

from __future__ import annotations

import pytest

from inilora_kernels import approximate
from inilora_kernels.errors import WeightError

from ..matrices import W


@pytest.mark.parametrize("scale", [1e200, 3e38, 1e-200])
def test_weights_beyond_float32(scale: float) -> None:
    with pytest.raises(WeightError, match="float32, in which factors are stored"):
        approximate(scale * W, 2, solver="krylov")


@pytest.mark.parametrize("solver", ["krylov", "exact"])
@pytest.mark.parametrize("scale", [3e37, 1e-35])
def test_weights_at_the_ends_of_float32(scale: float, solver: str) -> None:
    factors = approximate((scale * W).float(), 2, solver=solver)
    assert factors.A.isfinite().all()
    assert factors.B.isfinite().all()
    assert factors.certificate.excess < 1e-6
