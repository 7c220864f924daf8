"""A factor file's records and tensors are checked at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inilora_kernels import FactorSet
from inilora_kernels.errors import FactorFileError

from .records import STEP, A, B, M, changed, header_of


@pytest.mark.parametrize(
    "tensors",
    [
        {A: torch.full((2, 5), float("nan"))},
        {B: torch.full((7, 2), float("inf"))},
        {A: torch.ones(10)},
        {A: torch.ones(2, 5, 1)},
        {A: torch.ones(1, 5)},
        {A: torch.ones(0, 5), B: torch.ones(7, 0)},
        {B: torch.ones(6, 2)},
        {A: torch.ones(2, 5, dtype=torch.int32)},
        {A: torch.ones(2, 5, dtype=torch.float64)},
        {A: torch.ones(2, 5).to(torch.float8_e4m3fn)},
        {STEP: torch.full((2, 5), float("nan"))},
        {STEP: torch.ones(3, 5)},
    ],
)
def test_a_wrong_tensor_is_refused(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    changed(file, header_of(file), tensors)
    with pytest.raises(FactorFileError, match=M):
        FactorSet.load(file)


def test_certificates_may_be_unknown_only_where_the_weights_are(file: Path) -> None:
    header = header_of(file)
    unknown = {"loss": float("nan"), "optimum": float("nan"), "energy": float("nan"), "source_sha256": ""}
    header["modules"][M].update(unknown)
    changed(file, header, {})
    assert FactorSet.load(file)[M].source_sha256 == ""
