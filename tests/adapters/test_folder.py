"""PEFT's adapter folder, as PEFT writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import LoraConfig

from inilora_kernels.adapters.export import export_delta

from ..factorized import factorize


def test_adapters_are_written_as_peft_writes_them(llama: Path, tmp_path: Path) -> None:
    factors = factorize(llama, ("q_proj", "v_proj"), rank=2)
    hub = shutil.copytree(llama, tmp_path / "hub/models--org--tiny/snapshots/0123")
    export_delta(hub, factors, tmp_path / "delta")
    config = json.loads((tmp_path / "delta/adapter/adapter_config.json").read_text())
    assert config["peft_version"] == __import__("peft").__version__
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    card = (tmp_path / "delta/adapter/README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "wrong" in card
    LoraConfig.from_pretrained(str(tmp_path / "delta/adapter"))
