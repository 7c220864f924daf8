"""The ends of every range: an error of ours before the work, never a raw one or a result of NaN."""

from __future__ import annotations

import pytest
import torch

from inilora_kernels import approximate
from inilora_kernels.errors import OptionError, WeightError

W = torch.rand(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1e300}, "gamma=1e\\+300"),
        ({"gamma": 2.0, "step_size": 1}, "gamma=2.0"),
        ({"lr": 1e300}, "lr=1e\\+300"),
        ({"steps": 10**11}, "steps=100000000000"),
        ({"init_std": 1e300}, "init_std=1e\\+300"),
        ({"init_std": 1e-300}, "init_std=1e-300"),
    ],
)
def test_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        approximate(W, 2, **options)


def test_a_huge_rank() -> None:
    with pytest.raises(WeightError, match="rank 1000000000 is more than"):
        approximate(W, 10**9)


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
