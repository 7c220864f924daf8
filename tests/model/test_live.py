"""Live models: the factors of their folder, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2LMHeadModel, LlamaForCausalLM

from inilora_kernels import FactorSet, approximate_model
from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.live import open_live
from inilora_kernels.model.targets import find_targets

from .live_factors import GIVEN, same


def test_llama(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    folder = approximate_model(llama, **GIVEN)
    for given in (model, model.state_dict(), model.model):
        assert same(approximate_model(given, **GIVEN), folder)
    assert list(approximate_model(model, **GIVEN)) == list(folder)


def test_gpt2_is_conv1d(gpt2: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    assert same(approximate_model(model, **GIVEN), approximate_model(gpt2, **GIVEN))


def test_nothing_is_changed(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    approximate_model(model, 2, target_modules="all-linear", cache=False, progress=False, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_module_of_ones_own() -> None:
    """Without a config: linear layers are known by their class, whatever they are called."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"table": nn.Embedding(9, 4), "query": nn.Linear(4, 6), "value": nn.Linear(4, 6), "out": nn.Bilinear(4, 4, 2)}
    )
    assert [target.module for target in find_targets(open_live(model), "all-linear")] == ["query", "value"]
    assert [target.kind for target in find_targets(open_live(model))] == ["query", "value"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_bitsandbytes(llama: Path, tmp_path: Path, bits: int) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    folder = approximate_model(tmp_path / "quantized", **GIVEN)
    assert len(folder) == 4
    assert same(approximate_model(model, **GIVEN), folder)


def test_what_is_refused(llama: Path) -> None:
    with torch.device("meta"):
        empty = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    with pytest.raises(CheckpointError, match="meta device"):
        open_live(empty)
    with pytest.raises(CheckpointError, match="no tensors"):
        open_live({})
    with pytest.raises(CheckpointError, match="another dict under 'model'"):
        open_live({"model": {"q_proj.weight": torch.ones(2, 2)}})
    with pytest.raises(CheckpointError, match="`approximate` takes layers"):
        open_live(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="has adapters already"):
        open_live({"q_proj.base_layer.weight": torch.ones(2, 2), "q_proj.lora_A.weight": torch.ones(1, 2)})


def test_the_factor_file_says_how_weights_were_dequantized(llama: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    approximate_model(model, **GIVEN).save(tmp_path / "factors.safetensors")
    assert {one.dequantization for one in FactorSet.load(tmp_path / "factors.safetensors").values()} == {
        "bitsandbytes nf4"
    }
    assert b"dequantization" not in approximate_model(llama, **GIVEN).to_bytes()
