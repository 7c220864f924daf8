"""What a base layer's weight is: its own and whole, or sharded, quantized, offloaded or shared."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from inilora_kernels.adapters.attach import attach, detach
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.adapters.weights import (
    device_of,
    require_own_weight,
    require_unshared_weight,
    users_of_weights,
    warn_if_rounded_away,
)
from inilora_kernels.errors import FactorFileError, OptionError, TargetError, WeightError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.lora_start import lora_model

from ..factorized import factorize, inilora_alpha


def shard(layer: nn.Module, rows: int) -> nn.Module:
    """As ZeRO-3 and FlatParameter leave a layer: with a part of its weight."""
    layer.weight = nn.Parameter(layer.weight[:rows].detach().clone())
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_may_be_changed(dtype: torch.dtype) -> None:
    for layer in (nn.Linear(4, 6), Conv1D(6, 4)):
        require_own_weight(layer.to(dtype), "q", "do that")


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Linear(4, 6, device="meta"), "offloaded or sharded .on the meta device."),
        (shard(nn.Linear(4, 6), 3), r"a shard of shape \(3, 4\)"),
        (shard(nn.Linear(4, 6), 0), r"a shard of shape \(0, 4\)"),
        (nn.ReLU(), "quantized or sharded .no `weight`."),
        (nn.Linear(4, 6).to(torch.float8_e4m3fn), "quantized or sharded .*float8"),
    ],
)
def test_what_is_not_wholly_there_may_not(layer: nn.Module, found: str) -> None:
    with pytest.raises(WeightError, match=rf"^layer.0.q: .*{found}.*; do that$"):
        require_own_weight(layer, "layer.0.q", "do that")


def test_a_shared_weight_is_named_with_its_other_user() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "q": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    users = users_of_weights(model)
    require_unshared_weight(users, "q", model["q"], "the residual", "do that")
    with pytest.raises(TargetError, match=r"head: its weight is also embedding\.weight, which the residual would"):
        require_unshared_weight(users, "head", model["head"], "the residual", "do that")


def test_a_wrapped_layer_shares_nothing_with_itself() -> None:
    wrapper = nn.Module()
    wrapper.base_layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"q": wrapper})
    require_unshared_weight(users_of_weights(model), "q", wrapper.base_layer, "the residual", "do that")


def test_an_offloaded_layer_is_where_accelerate_brings_it() -> None:
    layer = nn.Linear(4, 4, device="meta")
    assert device_of(nn.Linear(4, 4)) == device_of(layer) == torch.device("cpu")
    layer._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert device_of(layer) == torch.device("cuda", 1)


def test_rounding_is_warned_of_where_it_costs_part_of_the_weight() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"q: the residual is 35 times as large .*rounds away about 7\.9% of the wei"):
        warn_if_rounded_away(W.bfloat16(), 35 * W, "q")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rounded_away(W, 35 * W, "q")
        warn_if_rounded_away(W.bfloat16(), W, "q")


def test_factors_of_another_model_of_the_same_shapes_are_refused(llama: Path, factors: FactorSet) -> None:
    """Nothing else tells: attached, they train, and only `convert` would find that the base is another."""
    torch.manual_seed(7)
    other = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(llama))
    mixed = LlamaForCausalLM.from_pretrained(llama)
    mixed.model.layers[1].self_attn.v_proj = other.model.layers[1].self_attn.v_proj
    larger = LlamaForCausalLM.from_pretrained(llama)
    larger.requires_grad_(False).model.layers[0].self_attn.q_proj.weight.mul_(3)
    for model, name in ((other, r"0\.self_attn\.q_proj and 3 more"), (mixed, "1.*v_proj"), (larger, "0.*q_proj of")):
        with pytest.raises(
            FactorFileError, match=rf"{name}.* do not have the weight that the factors were computed from"
        ):
            attach(model, factors)
    with pytest.raises(FactorFileError, match="do not have the weight"):
        lora_model(other, factors)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(FactorFileError, match="do not have the weight"):
        initialize_peft(get_peft_model(other, config), factors)


def quantized_and_back(model: nn.Module) -> nn.Module:
    """To 3 bits a weight."""
    for parameter in model.requires_grad_(False).parameters():
        scale = parameter.abs().amax(-1, keepdim=True) / 3.5
        parameter.copy_((parameter / scale).round() * scale)
    return model


def pruned(model: nn.Module) -> nn.Module:
    for parameter in model.requires_grad_(False).parameters():
        parameter.masked_fill_(parameter.abs() < parameter.abs().median(), 0.0)
    return model


@pytest.mark.parametrize("alpha", [False, True])
def test_other_versions_of_the_same_weights_are_taken(llama: Path, factors: FactorSet, alpha: bool) -> None:
    factors = factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha) if alpha else factors
    for version in (quantized_and_back, pruned, nn.Module.half, nn.Module.bfloat16, lambda model: model.to("meta")):
        attach(version(LlamaForCausalLM.from_pretrained(llama)), factors)
    model = LlamaForCausalLM.from_pretrained(llama)
    with torch.autocast("cpu", torch.bfloat16):
        attach(model, factors)
    attach(detach(model), factors, form="residual")


def test_a_base_that_holds_a_residual_says_nothing_of_its_weight(llama: Path, factors: FactorSet) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = initialize_peft(get_peft_model(LlamaForCausalLM.from_pretrained(llama), config), factors, form="residual")
    with pytest.raises(OptionError, match="the base weight is a residual already"):
        initialize_peft(model, factors, form="residual", overwrite=True)
