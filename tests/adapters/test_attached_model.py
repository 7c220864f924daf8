"""Attached models saved by libraries that do not know of adapters, and loaded as the plain model, or to go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from inilora_kernels.adapters.attach import attach, detach, merge, unmerge
from inilora_kernels.errors import TargetError, WeightError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Factors

from ..factorized import truncated_svd
from .models import NONE, small
from .started import FORMS, change, load, logits


def by_torch(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    torch.save(model.state_dict(), folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=True)


def by_safetensors(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return safetensors.torch.load_file(folder / "model.safetensors")


def by_accelerate(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("save", [by_torch, by_safetensors, by_accelerate])
def test_a_plain_model_loads_the_state_dict_as_trained_and_an_attached_one_goes_on(
    llama: Path, factors: FactorSet, tmp_path: Path, form: Any, save: Callable[[nn.Module, Path], dict[str, Tensor]]
) -> None:
    model = attach(load(llama), factors, form=form, scaling=2.0)
    trained = change(model)
    assert not torch.allclose(trained, logits(load(llama)), rtol=0, atol=1e-2)
    state_dict = save(model, tmp_path)
    plain = load(llama)
    result = plain.load_state_dict(state_dict, strict=False)
    assert not result.missing_keys
    assert all(".lora_" in key for key in result.unexpected_keys)
    assert torch.allclose(logits(plain), trained, rtol=0, atol=1e-5)
    again = attach(load(llama), factors, form=form, scaling=2.0)
    again.load_state_dict(state_dict)
    assert torch.equal(logits(again), trained)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_writes_the_trained_model(llama: Path, factors: FactorSet, tmp_path: Path, dtype: Any) -> None:
    model = attach(LlamaForCausalLM.from_pretrained(llama, dtype=dtype).eval(), factors)
    model.save_pretrained(tmp_path / "start")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=dtype)
    assert torch.equal(logits(start), logits(LlamaForCausalLM.from_pretrained(llama, dtype=dtype).eval()))
    trained = change(model)
    copy.deepcopy(model).save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=dtype)
    near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    assert torch.allclose(logits(loaded), trained, **near)
    merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(merged), logits(loaded))
    # A sharded model's gathered state dict has the base layers' own names.
    own = {name: parameter.detach() for name, parameter in unmerge(model).named_parameters()}
    model.save_pretrained(tmp_path / "given", state_dict=own)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "given", dtype=dtype)), logits(loaded))
    assert "save_pretrained" not in vars(detach(model))


def test_a_trainers_checkpoints_are_models_and_resume(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        rows = [{"input_ids": torch.arange(1, 9) + i, "labels": torch.arange(1, 9) + i} for i in range(4)]
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=steps, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True
        )
        return Trainer(attach(load(llama), factors), arguments, train_dataset=rows)

    run = trainer(2)
    run.train()
    trained = logits(run.model.eval())
    assert not torch.allclose(trained, logits(load(llama)), rtol=0, atol=1e-2)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model.eval()), trained)


def test_a_part_of_the_model_saves_itself(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """As sentence-transformers, Lightning modules and diffusers' pipelines save what they hold."""
    around = nn.ModuleDict({"inner": load(llama)})
    attach(around, FactorSet({f"inner.{name}": one for name, one in factors.items()}, {}))
    trained = change(around["inner"])
    around["inner"].save_pretrained(tmp_path / "inner")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "inner")
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_that_is_trained_as_well_is_kept(llama: Path, factors: FactorSet, tmp_path: Path, form: Any) -> None:
    def unfrozen() -> nn.Module:
        return attach(load(llama), factors, form=form, scaling=2.0).requires_grad_(True)

    model = unfrozen()
    trained = change(model)
    frozen = attach(load(llama), factors, form=form, scaling=2.0)
    frozen.load_state_dict({name: one for name, one in model.state_dict().items() if "lora_" in name}, strict=False)
    assert not torch.allclose(logits(frozen), trained, rtol=0, atol=1e-2)
    model.save_pretrained(tmp_path)
    near = {"rtol": 0, "atol": 1e-5}
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained, **near)
    again = unfrozen()
    again.load_state_dict(model.state_dict())
    assert torch.allclose(logits(again), trained, **near)
    for change_it in (merge, unmerge):
        assert torch.allclose(logits(change_it(model)), trained, **near)
    with pytest.raises(RuntimeError, match="unfreeze what was trained besides"):
        frozen.load_state_dict(model.state_dict())


def test_what_has_no_place_for_the_update_is_refused(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    tied = LlamaForCausalLM(LlamaConfig.from_pretrained(llama, tie_word_embeddings=True))
    start = Factors(*truncated_svd(tied.lm_head.weight.detach(), 4), NONE, "")
    with pytest.raises(TargetError, match=r"saving the trained weight would change too; write .* by `save_adapter`"):
        attach(tied, FactorSet({"lm_head": start}, {})).save_pretrained(tmp_path / "tied")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(llama, quantization_config=four_bits, device_map="cpu")
    attach(quantized, factors)
    with pytest.raises(WeightError, match="by `save_adapter`"):
        quantized.save_pretrained(tmp_path / "quantized")
    assert not list(tmp_path.iterdir())
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in quantized.state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_that_does_not_belong_is_refused(form: Any) -> None:
    torch.manual_seed(0)
    model, factors = small()
    base = copy.deepcopy(model)
    plain = copy.deepcopy(model).state_dict()
    trained = attach(model, factors, form=form).state_dict()
    own = {name: one.detach() for name, one in model.named_parameters()}
    attached = attach(base, factors, form=form)
    attached.load_state_dict(own)  # the base layers' own names
    before = {name: one.clone() for name, one in attached.state_dict().items()}
    for state_dict, match in (
        (plain, "comes without A and B, from a plain model"),
        ({**trained, "0.weight": trained["0.weight"] + 0.1}, "from other factors, or on another base"),
        ({**trained, "2.lora_B.weight": trained["2.lora_B.weight"] * 2}, "from other factors, or on another base"),
    ):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=match):
                attached.load_state_dict(state_dict, strict=strict)
            attached.load_state_dict(before)
    merge(attached)
    with pytest.raises(RuntimeError, match="call `unmerge` first"):
        attached.load_state_dict(trained)
