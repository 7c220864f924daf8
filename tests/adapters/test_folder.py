"""PEFT's adapter folder, as PEFT writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import BdLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.export import export_delta
from inilora_kernels.adapters.folder import read_adapter
from inilora_kernels.errors import FactorFileError, WeightError
from inilora_kernels.factor_set import FactorSet

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
    fields = ModelCard(card).data.to_dict()
    assert fields["base_model"] == "org/tiny"
    assert fields["library_name"] == "peft"
    assert {"base_model:adapter:org/tiny", "lora"} < set(fields["tags"])
    assert "adds nothing yet" in card
    LoraConfig.from_pretrained(str(tmp_path / "delta/adapter"))
    export_delta(hub, factors, tmp_path / "text", task_type="CAUSAL_LM")
    assert ModelCard.load(tmp_path / "text/adapter/README.md").data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"lora_bias": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
        {"use_qalora": True, "qalora_group_size": 4},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    ],
)
def test_what_is_more_than_a_and_b_is_refused_with_what_to_do(
    llama: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """peft 436: trained with biases or embeddings, and only then told that they cannot be converted."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    with pytest.raises(FactorFileError, match=r"train again without it, or .*merge_and_unload"):
        read_adapter(tmp_path)


def test_repeated_layers_are_refused(llama: Path, tmp_path: Path) -> None:
    """Their adapter was merged into the layers of the original model that have the same numbers."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[1, 2], [0, 1]])
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    with pytest.raises(FactorFileError, match=r"layer_replication .*merge_and_unload"):
        read_adapter(tmp_path)


def test_tensors_of_another_rank_than_the_configs_are_refused(llama: Path, tmp_path: Path) -> None:
    """Their scaling is unknown, and that of A and B alone next to the config of the plain LoRA was taken for half."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config)
    model.save_pretrained(tmp_path)
    read_adapter(tmp_path)
    LoraConfig(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    with pytest.raises(FactorFileError, match=r"v_proj has A of rank 4, and adapter_config\.json says 8"):
        read_adapter(tmp_path)


def test_an_adapter_in_a_folder_below_is_named(llama: Path, tmp_path: Path) -> None:
    """PEFT saves an adapter that is not called default into a folder of its name."""
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config, "two").save_pretrained(tmp_path)
    with pytest.raises(FactorFileError, match=r"adapter_config\.json: no such file; there is one in .*two; give"):
        read_adapter(tmp_path)
    read_adapter(tmp_path / "two")


def trained(llama: Path, folder: Path) -> tuple[FactorSet, Path]:
    factors = factorize(llama, ("q_proj",), rank=2)
    export_delta(llama, factors, folder / "delta")
    return factors, folder / "delta/adapter"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8])
def test_numbers_that_nobody_trains_are_refused(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of complex ones the imaginary part was dropped without a word."""
    _, adapter = trained(llama, tmp_path)
    file = adapter / "adapter_model.safetensors"
    try:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    except KeyError:
        pytest.skip(f"this safetensors stores no {dtype}")
    with pytest.raises(FactorFileError, match=f"stored as {str(dtype)[6:]}; save A and B in float32"):
        read_adapter(adapter)


def test_nan_in_a_module_trained_whole_is_refused(llama: Path, tmp_path: Path) -> None:
    factors, adapter = trained(llama, tmp_path)
    file = adapter / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.full((64, 32), torch.nan)}
    save_file({**load_file(file), **head}, file)
    with pytest.raises(FactorFileError, match=r"lm_head.weight holds NaN; take an earlier checkpoint"):
        convert(adapter, factors, tmp_path / "out")


def test_an_update_beyond_float32_is_refused(llama: Path, tmp_path: Path) -> None:
    """A is divided among its rows and rounded to float32 after the check: Inf was written."""
    factors, adapter = trained(llama, tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0 + 3e38 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(WeightError, match=r"leaves float32's range"):
        convert(adapter, factors, tmp_path / "out", rank=2, insist=True)
    assert not (tmp_path / "out").exists()


def test_the_config_in_place_of_its_folder(llama: Path, tmp_path: Path) -> None:
    factors, adapter = trained(llama, tmp_path)
    with pytest.raises(FactorFileError, match=r"adapter_config.json: no adapter; give the folder"):
        convert(adapter / "adapter_config.json", factors, tmp_path / "out")
