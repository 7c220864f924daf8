"""What other programs do with a PeftModel that started from factors: copy, save, load, resume, disable and merge it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.layer import Form
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.errors import FactorFileError, OptionError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize, inilora_alpha

FORMS: tuple[Form, ...] = ("delta", "residual")
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def factors(llama: Path) -> FactorSet:
    return factorize(llama, ("q_proj", "v_proj"), rank=4)


def load(folder: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 11)[None]).logits


def started(folder: Path, factors: FactorSet, form: Form, **options: object) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    return initialize_peft(get_peft_model(load(folder), config).eval(), factors, form=form)


def change(model: nn.Module) -> Tensor:
    """A training's stand-in; returns the new output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return logits(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_of_the_adapter_is_right_by_itself(llama: Path, factors: FactorSet, form: Form, trained: bool) -> None:
    """trl 3196: the trainers for DPO, GRPO, KTO and RLOO copy "default" into a reference "ref" in this way."""
    model = started(llama, factors, form)
    expected = change(model) if trained else logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    change(model)
    model.set_adapter("ref")
    assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {}, "alpha_pattern": {"q_proj": 2}}])
def test_what_it_saves_is_a_plain_lora_for_the_original_base(
    llama: Path, factors: FactorSet, form: Form, options: dict[str, object], tmp_path: Path
) -> None:
    """peft 1929: A and B alone, taken for a LoRA of W, add W's own low-rank part."""
    model = started(llama, factors, form, **options)
    trained = change(model)
    model.save_pretrained(tmp_path / "trained")
    assert torch.allclose(
        logits(PeftModel.from_pretrained(load(llama), tmp_path / "trained")), trained, rtol=0, atol=1e-5
    )
    convert(tmp_path / "trained", factors, tmp_path / "lora", base=llama)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path / "lora")), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_resumes_from_what_it_saved(llama: Path, factors: FactorSet, form: Form, tmp_path: Path) -> None:
    model = started(llama, factors, form)
    trained = change(model)
    model.save_pretrained(tmp_path / "trained")
    again = started(llama, factors, form)
    again.load_adapter(tmp_path / "trained", "default", is_trainable=True)
    assert torch.equal(logits(again), trained)
    in_bfloat16 = started(llama, factors, form).bfloat16()
    in_bfloat16.load_adapter(tmp_path / "trained", "default")
    for name, parameter in in_bfloat16.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter.bfloat16(), again.get_parameter(name).bfloat16())
    other = started(llama, factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha), form)
    with pytest.raises(FactorFileError, match="trained from other factors"):
        other.load_adapter(tmp_path / "trained", "default")


def test_training_is_not_overwritten(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """lerobot 3459: going on with a trained adapter starts it anew and says nothing."""
    model = started(llama, factors, "delta")
    initialize_peft(model, factors)
    trained = change(model)
    with pytest.raises(OptionError, match=r"is not new.*overwrite=True starts anew"):
        initialize_peft(model, factors)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True)
    with pytest.raises(OptionError, match=r"rank 8.*it is trained, and go on with it"):
        initialize_peft(again, factors)
    assert torch.equal(logits(initialize_peft(model, factors, overwrite=True)), logits(load(llama)))


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
