"""A factor file of two matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inilora_kernels import Certificate, Factors, FactorSet

from .records import M


@pytest.fixture
def file(tmp_path: Path) -> Path:
    one = Factors(
        A=torch.ones(2, 5),
        B=torch.ones(7, 2),
        certificate=Certificate(1.5, 1.0, 3.0, 10),
        source_sha256="ab" * 32,
        rows=(7, 14),
        history=((5, 2.0), (10, 1.5)),
        checkpoints={5: (torch.ones(2, 5), torch.ones(7, 2))},
        singular_values=(2.0, 1.0),
    )
    FactorSet({M: one, "layer.0.value": one}, {"method": "inilora"}).save(tmp_path / "factors")
    return tmp_path / "factors"
