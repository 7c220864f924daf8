from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inilora_kernels.errors import FactorFileError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.foreign_factors import certified

QUERY = "encoder.layer.0.attention.self.query"


def test_a_folder_of_theirs_is_read_and_certified(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    for name, part in minilm_factors.items():
        torch.save({"A": part.B, "B": part.A.T.clone().T}, tmp_path / f"{name}.weight.pt")
    torch.save({"loss": [0.1, 0.01, 0.001]}, tmp_path / f"{QUERY}.weight.loss.pt")
    bare, checked = FactorSet.load(tmp_path), FactorSet.load(tmp_path, minilm)
    assert set(bare) == set(checked) == set(minilm_factors)
    for name, part in minilm_factors.items():
        assert torch.equal(bare[name].A, part.A)
        assert torch.equal(bare[name].B, part.B)
        assert bare[name].A.is_contiguous()
        assert math.isnan(bare[name].certificate.loss)
        assert checked[name].certificate.loss == pytest.approx(part.certificate.loss)
        assert checked[name].certificate.optimum == pytest.approx(part.certificate.optimum)
        assert checked[name].source_sha256 == part.source_sha256
    assert bare[QUERY].history == (
        (0, pytest.approx(14745.6)),
        (1, pytest.approx(1474.56)),
        (2, pytest.approx(147.456)),
    )
    checked.save(tmp_path / "factors.safetensors")
    assert FactorSet.load(tmp_path / "factors.safetensors")[QUERY].certificate == checked[QUERY].certificate


def test_factors_of_another_model_are_refused(minilm: Path, gpt2: Path, minilm_factors: FactorSet) -> None:
    with pytest.raises(FactorFileError, match="not of this model"):
        certified(minilm_factors.modules, gpt2)
    part = minilm_factors[QUERY]
    with pytest.raises(FactorFileError, match=r"is \(384, 384\), but the factors' product is \(380, 384\)"):
        certified({QUERY: replace(part, B=part.B[:380])}, minilm)
