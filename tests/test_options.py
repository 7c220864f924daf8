"""Options out of range, and options that nothing reads."""

from __future__ import annotations

import warnings

import pytest
import torch

from inilora_kernels import approximate
from inilora_kernels.errors import OptionError

from .matrices import W


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


def test_options_that_nothing_reads_are_named(recwarn: pytest.WarningsRecorder) -> None:
    approximate(torch.eye(4), rank=1, solver="krylov", steps=500, tol=1e-3)
    assert "solver='krylov' does not read steps, tol" in next(str(one.message) for one in recwarn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        approximate(torch.eye(4), rank=1, solver="krylov")
