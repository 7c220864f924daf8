"""What PEFT's users do with a trained model, by their reports: the result is the trained model, in both forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.choices import Form
from inilora_kernels.factor_set import FactorSet

from .started import FORMS, TARGETS, change, load, logits, started

IDS = torch.arange(1, 11)[None]

# Each takes a trained model and an empty folder, and returns what should be the trained model's logits.
Step = Callable[[PeftModel, Path, Path, FactorSet], Tensor]


def merged_then_saved(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    model.merge_adapter()
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(load(llama), folder))


def safely_merged_and_back(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(load(llama)), rtol=0, atol=1e-5)
    model.unmerge_adapter()
    return logits(model)


def converted(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    model.save_pretrained(folder / "trained")  # [A − A0; A0] and [B, B − B0]
    convert(folder / "trained", factors, folder / "lora", llama)
    return logits(PeftModel.from_pretrained(load(llama), folder / "lora"))


def merged_on_disk(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    model.save_pretrained(folder / "trained")
    export_merged(folder / "trained", factors, folder / "merged", llama)
    return logits(load(folder / "merged"))


def converted_after_a_cast(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    model.double().save_pretrained(folder / "trained")
    model.float()
    convert(folder / "trained", factors, folder / "lora", llama)
    return logits(PeftModel.from_pretrained(load(llama), folder / "lora"))


def resized(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary + 6)
    model.save_pretrained(folder)
    base = load(llama)
    base.resize_token_embeddings(vocabulary + 6)
    return logits(PeftModel.from_pretrained(base, folder))[..., :vocabulary]


def prepared_for_kbit_training(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    return logits(prepare_model_for_kbit_training(model).eval())


def next_to_a_loaded_one(model: PeftModel, llama: Path, folder: Path, factors: FactorSet) -> Tensor:
    plain = get_peft_model(load(llama), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).eval()
    plain.save_pretrained(folder)
    model.load_adapter(folder, "other")
    trained = logits(model)
    model.set_adapter("other")
    assert torch.allclose(logits(model), logits(plain), rtol=0, atol=1e-5)
    model.set_adapter("default")
    with torch.no_grad():
        mixed = model(IDS.repeat(3, 1), adapter_names=["other", "default", "__base__"]).logits
    for row, wanted in zip(mixed, (logits(plain), trained, logits(load(llama))), strict=True):
        assert torch.allclose(row, wanted[0], rtol=0, atol=1e-5)
    return mixed[1:2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "step",
    [
        merged_then_saved,  # peft 1035, 2502
        safely_merged_and_back,  # peft 1388
        converted,  # LlamaFactory 9404
        merged_on_disk,  # peft 1836
        converted_after_a_cast,
        resized,  # transformers 45127
        prepared_for_kbit_training,
        next_to_a_loaded_one,  # peft 2270
    ],
)
def test_it_is_the_trained_model(llama: Path, factors: FactorSet, form: Form, step: Step, tmp_path: Path) -> None:
    model = started(llama, factors, form)
    trained = change(model)
    assert torch.allclose(step(model, llama, tmp_path, factors), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_trained_in_16_bits_and_cast_it_converts(llama: Path, factors: FactorSet, form: Form, tmp_path: Path) -> None:
    """A0 and B0 are then those of 16 bits, which the folder holds: they are what training has moved away from."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    base = load(llama).bfloat16()
    model = initialize_peft(get_peft_model(base, config, autocast_adapter_dtype=False).eval(), factors, form).float()
    change(model)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora", llama)
    found, wanted = (logits(PeftModel.from_pretrained(load(llama), tmp_path / name)) for name in ("lora", "trained"))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_before_training_prepared_or_checkpointed(llama: Path, factors: FactorSet, form: Form) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS)
    prepared = get_peft_model(prepare_model_for_kbit_training(load(llama)), config).eval()
    assert torch.allclose(logits(initialize_peft(prepared, factors, form)), logits(load(llama)), rtol=0, atol=1e-5)
    gradients = []
    for checkpointing in (False, True):
        model = started(llama, factors, form)
        change(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if "lora_" in name])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
