"""PEFT's layers that started from factors, as other programs use them: copied, resumed, disabled, merged, swapped."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError, TargetError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize
from .started import FORMS, TARGETS, change, load, logits, started


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_the_adapter_is_right_by_itself(llama: Path, factors: FactorSet, form: Form, trained: bool) -> None:
    """trl 3196: the trainers for DPO, GRPO, KTO and RLOO copy "default" into a reference "ref" in this way."""
    model = started(llama, factors, form)
    expected = change(model) if trained else logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    _copy(model, "ref")
    change(model)
    model.set_adapter("ref")
    assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_copys_config_outlives_its_source(llama: Path, factors: FactorSet, form: Form) -> None:
    model = started(llama, factors, form)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    model.delete_adapter("default")
    model.add_adapter("third", model.peft_config["ref"])
    model.set_adapter("third")
    assert torch.allclose(logits(model), logits(load(llama)), rtol=0, atol=0 if form == "delta" else 1e-5)


def _copy(model: PeftModel, name: str) -> None:
    for key, parameter in model.named_parameters():
        if ".default." in key:
            model.get_parameter(key.replace(".default.", f".{name}.")).data.copy_(parameter.data)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_by_a_copied_config_is_right_too(llama: Path, factors: FactorSet, form: Form) -> None:
    """trl 3196, by other trainers."""
    model = started(llama, factors, form)
    expected = change(model)
    for name, copied in (("deep", copy.deepcopy), ("replaced", dataclasses.replace)):
        model.add_adapter(name, copied(model.peft_config["default"]))
        _copy(model, name)
        model.set_adapter(name)
        assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)
        model.set_adapter("default")


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_in_a_plain_lora_is_refused_where_it_comes_into_use(llama: Path, factors: FactorSet, form: Form) -> None:
    """trl 3196, with a config that says nothing of the start: the copy would compute W + BA."""
    model = started(llama, factors, form)
    change(model)
    model.add_adapter("ref", LoraConfig(**model.peft_config["default"].to_dict()))
    model.set_adapter("ref")  # a LoRA like any other, so far
    model.set_adapter("default")
    _copy(model, "ref")
    uses = (
        lambda: model.set_adapter("ref"),
        lambda: model.merge_adapter(["ref"]),
        lambda: model.merge_and_unload(adapter_names=["ref"]),
        lambda: model.add_weighted_adapter(["ref"], [1.0], "weighted"),
        lambda: model(torch.arange(1, 4)[None], adapter_names=["ref"]),
    )
    for use in uses:
        with pytest.raises(OptionError, match=r"'ref': a plain LoRA that holds A and B of 'default'"):
            use()
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_added_with_its_config_starts_from_the_same_factors(
    llama: Path, factors: FactorSet, form: Form
) -> None:
    model = started(llama, factors, form)
    expected = logits(load(llama))
    change(model)
    config = model.peft_config["default"]
    model.add_adapter("again", config)
    model.set_adapter("again")
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="started_from"):
        get_peft_model(load(llama), config)
    model.delete_adapter("default")
    with pytest.raises(OptionError, match="adapter 'default', which is gone"):
        model.add_adapter("late", config)


@pytest.mark.parametrize("rank", [4, 8])
def test_hotswap_of_a_plain_lora(llama: Path, factors: FactorSet, rank: int, tmp_path: Path) -> None:
    """PEFT's hotswap replaces A and B and knows nothing of A0 and B0."""
    plain = get_peft_model(load(llama), LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)).eval()
    plain.save_pretrained(tmp_path)
    model = started(llama, factors, "delta")
    change(model)
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.allclose(logits(model), logits(plain), rtol=0, atol=1e-5)


def test_the_residual_base_is_the_original_wherever_its_adapter_is_not_in_effect(
    llama: Path, factors: FactorSet
) -> None:
    """DPO and KTO with the adapter disabled as the reference; peft 2184; a second adapter on the same base."""
    expected = logits(load(llama))
    model = started(llama, factors, "residual")
    trained = change(model)

    def near(found: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(found, wanted, rtol=0, atol=1e-5)

    with model.disable_adapter():
        assert near(logits(model), expected)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("plain")
    assert near(logits(model), expected)
    model.set_adapter("default")
    assert near(logits(model), trained)
    with torch.no_grad():
        ids = torch.arange(1, 11).expand(3, -1)
        mixed = model(ids, adapter_names=["default", "__base__", "plain"]).logits
    assert near(mixed[:1], trained)
    assert near(mixed[1:2], expected)
    assert near(mixed[2:], expected)
    assert near(logits(copy.deepcopy(model).unload()), expected)
    assert near(logits(copy.deepcopy(model).merge_and_unload()), trained)
    assert near(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["plain"])), expected)
    model.delete_adapter("default")
    assert near(logits(model), expected)


def test_two_residual_adapters_on_different_modules(llama: Path) -> None:
    expected = logits(load(llama))
    model = get_peft_model(load(llama), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    initialize_peft(model, factorize(llama, ("q_proj",), rank=4), form="residual")
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    initialize_peft(model, factorize(llama, ("v_proj",), rank=4), form="residual", adapter_name="second")
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5), names


def test_deepcopied_it_stands_alone(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    model = started(llama, factors, "delta")
    twin = copy.deepcopy(model)
    trained = change(twin)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(load(llama)))
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path)), trained, rtol=0, atol=1e-5)


def test_a_tied_output_layer_is_not_merged(llama: Path, tmp_path: Path) -> None:
    """peft 2777: merged into a weight that it shares, lm_head's update changes the embedding too."""
    tied = load(llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.config.tie_word_embeddings = True
    tied.save_pretrained(tmp_path / "tied")
    embedding = factorize(tmp_path / "tied", ("embed_tokens",), rank=4)
    factors = FactorSet({"lm_head": embedding["model.embed_tokens"]}, {})
    model = get_peft_model(load(tmp_path / "tied"), LoraConfig(r=4, target_modules=["lm_head"])).eval()
    trained = change(initialize_peft(model, factors))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TargetError, match=r"also model\.embed_tokens\.weight, which merging would change"):
            merge()
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(load(tmp_path / "tied"), tmp_path / "trained")
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)
