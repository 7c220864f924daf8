"""What is refused once the matrices are known, and what is warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inilora_kernels import FactorSet, approximate
from inilora_kernels.errors import (
    OptionError,
    WeightError,
)

from .matrices import W


def test_a_huge_rank() -> None:
    with pytest.raises(WeightError, match="rank 1000000000 is more than"):
        approximate(W, 10**9)


def test_a_start_of_tensors_is_refused() -> None:
    with pytest.raises(OptionError, match="give Factors for each matrix"):
        approximate(torch.ones(2, 2), rank=1, solver="krylov", start=(torch.ones(1, 2), torch.ones(2, 1)))  # type: ignore[arg-type]


def test_an_uncertified_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct solver returned without a word where it had not reached its certificate."""
    monkeypatch.setattr("inilora_kernels.solvers.krylov.DENSE_SIZE", 0)
    with pytest.warns(UserWarning, match="matrix 0: .* certificate was not reached"):
        factors = approximate(torch.eye(700), rank=8, solver="krylov")
    assert not factors.certificate.certified
    assert factors.certificate.loss == pytest.approx(692)
    FactorSet({"0.q": factors}, {}).save(tmp_path / "factors.safetensors")
    assert not FactorSet.load(tmp_path / "factors.safetensors")["0.q"].certificate.certified
