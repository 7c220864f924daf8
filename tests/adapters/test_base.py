"""The model that factors were computed from: found again, and no other one taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.errors import FactorFileError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize


def test_factors_of_another_model_are_refused(minilm: Path, sharded: Path, gpt2: Path, tmp_path: Path) -> None:
    factors = factorize(sharded)
    for export in (export_residual, export_delta):
        with pytest.raises(
            FactorFileError, match=r"query\.weight is not the weight that these factors were computed from"
        ):
            export(minilm, factors, tmp_path / "out")
        with pytest.raises(FactorFileError, match=r"not of this model.*no linear module"):
            export(gpt2, factors, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_residual_remembers_its_factors(
    minilm: Path, minilm_factors: FactorSet, minilm_alpha: FactorSet, tmp_path: Path
) -> None:
    export_residual(minilm, minilm_factors, tmp_path / "out")
    with pytest.raises(FactorFileError, match="residual of other factors than these"):
        convert(tmp_path / "out/adapter", minilm_alpha, tmp_path / "lora")
    # Naming the residual as the base means the original that it was computed from.
    convert(tmp_path / "out/adapter", minilm_factors, tmp_path / "lora", base=tmp_path / "out/base")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(minilm)


def test_a_merged_folder_with_a_copy_of_the_record_is_no_residual(llama: Path, tmp_path: Path) -> None:
    """axolotl merge-lora copies every file of the base folder: the next stage could neither convert nor merge."""
    factors = factorize(llama, ("q_proj", "v_proj"), rank=2)
    export_residual(llama, factors, tmp_path / "out")
    record = tmp_path / "out/base/inilora_residual.json"
    second = shutil.copytree(llama, tmp_path / "merged")
    shutil.copy(record, second)
    next_factors = factorize(second, ("q_proj", "v_proj"), rank=4)
    export_delta(second, next_factors, tmp_path / "next")
    convert(tmp_path / "next/adapter", next_factors, tmp_path / "lora")
    export_merged(tmp_path / "next/adapter", next_factors, tmp_path / "again")
    assert not (tmp_path / "again/inilora_residual.json").exists()
    for damage in ("{", "[]", json.dumps({"base": 5}), "[" * 10_000):
        record.write_text(damage)
        with pytest.raises(FactorFileError, match="damaged"):
            convert(tmp_path / "out/adapter", factors, tmp_path / "no")
