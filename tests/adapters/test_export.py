from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModel, GPT2LMHeadModel

from inilora_kernels.adapters.attach import attach, trainable_parameters
from inilora_kernels.adapters.attached_model import adapters
from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.export import _Residual, export_delta, export_residual, save_adapter
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import CheckpointError, FactorFileError, OptionError, OutputError, TargetError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Certificate, Factors
from inilora_kernels.model.fused import row_index

from ..factorized import factorize, inilora_alpha
from .models import output
from .started import FORMS, change, load, logits

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora_alpha": {"lora_alpha": 32},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_peft_loads_the_residual_as_the_original(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    export_residual(minilm, minilm_factors, tmp_path / "out", **options)
    base = AutoModel.from_pretrained(tmp_path / "out/base")
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter", is_trainable=True)
    assert (output(model) - output(AutoModel.from_pretrained(minilm))).abs().max() < 2e-5
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 8 * (384 + 384)
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == ["query", "value"]
    assert config["base_model_name_or_path"] == str((tmp_path / "out/base").resolve())


def test_auto_peft_model_finds_base_and_adapter_by_itself(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    export_residual(minilm, minilm_factors, tmp_path / "out", task_type="FEATURE_EXTRACTION")
    model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "out/adapter")
    assert (output(model) - output(AutoModel.from_pretrained(minilm))).abs().max() < 2e-5


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("start", ["svd", "alpha"])
def test_load_delta_starts_from_the_original_to_the_bit(
    minilm: Path,
    minilm_factors: FactorSet,
    minilm_alpha: FactorSet,
    tmp_path: Path,
    options: dict[str, Any],
    start: str,
) -> None:
    export_delta(minilm, {"svd": minilm_factors, "alpha": minilm_alpha}[start], tmp_path / "out", **options)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = output(AutoModel.from_pretrained(minilm).to(dtype))
        model = load_delta(AutoModel.from_pretrained(minilm).to(dtype), tmp_path / "out")
        assert torch.equal(output(model), expected)
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def first_step(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of what is trained, by name."""
    model(torch.arange(1000, 1020)[None])[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_plain_peft_trains_the_delta_as_a_lora_that_is_never_mistaken(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    """peft 1929: A and B alone, loaded as a LoRA of W, add W's low-rank part a second time."""
    export_delta(minilm, minilm_factors, tmp_path / "out", lora_alpha=4)
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModel.from_pretrained(minilm).to(dtype)
        expected = output(base)
        assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path / "out/adapter")), expected)
        bare = get_peft_model(
            AutoModel.from_pretrained(minilm).to(dtype), LoraConfig.from_pretrained(tmp_path / "out/adapter")
        )
        bare.load_adapter(tmp_path / "out/adapter", "default")  # PEFT reads no config here
        assert torch.equal(output(bare), expected)

    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / "out/adapter", is_trainable=True)
    ours = load_delta(AutoModel.from_pretrained(minilm), tmp_path / "out")
    found, wanted = first_step(plain.eval()), first_step(ours.eval())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        moving, start = found[name].chunk(2, dim=0) if "lora_A" in name else reversed(found[name].chunk(2, dim=1))
        assert torch.allclose(moving, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
        assert not start.any()

    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    trained = output(plain)
    plain.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / "trained")
    assert torch.equal(output(loaded), trained)
    assert set(convert(tmp_path / "trained", minilm_factors, tmp_path / "lora").values()) == {0.0}
    assert (
        output(PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / "lora")) - trained
    ).abs().max() < 2e-5
    assert (output(load_delta(AutoModel.from_pretrained(minilm), tmp_path / "trained")) - trained).abs().max() < 2e-5
    assert (trained - expected.float()).abs().max() > 0.05
    with pytest.raises(FactorFileError, match="its start was trained too, as PEFT alone does"):
        ours.load_adapter(tmp_path / "trained", "default")


def test_what_is_no_delta_folder_is_refused(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["query", "value"])
    get_peft_model(AutoModel.from_pretrained(minilm), config).save_pretrained(tmp_path / "odd")
    with pytest.raises(FactorFileError, match="has rank 3, which is not twice that of a start"):
        load_delta(AutoModel.from_pretrained(minilm), tmp_path / "odd")
    export_residual(minilm, minilm_factors, tmp_path / "residual")
    with pytest.raises(FactorFileError, match="does not hold where it started"):  # A and B alone
        load_delta(AutoModel.from_pretrained(minilm), tmp_path / "residual")
    export_delta(minilm, minilm_factors, tmp_path / "out")
    (tmp_path / "out/initial").mkdir()
    with pytest.raises(FactorFileError, match="of an earlier version, of two adapters; export it again"):
        load_delta(AutoModel.from_pretrained(minilm), tmp_path / "out")
    with pytest.raises(FactorFileError, match="no such file"):
        load_delta(AutoModel.from_pretrained(minilm), tmp_path / "gone")


def test_gpt2s_conv1d_with_a_fused_weight(gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path) -> None:
    original = GPT2LMHeadModel.from_pretrained(gpt2)
    export_residual(gpt2, gpt2_factors, tmp_path / "residual")
    export_delta(gpt2, gpt2_factors, tmp_path / "delta")
    ids = torch.arange(20)[None]
    expected = original.eval()(ids).logits
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "residual/base")
    residual = PeftModel.from_pretrained(base, tmp_path / "residual/adapter").eval()
    assert residual.peft_config["default"].fan_in_fan_out
    assert torch.allclose(residual(ids).logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(
        base.transformer.h[0].attn.c_attn.base_layer.weight, original.transformer.h[0].attn.c_attn.weight
    )
    assert torch.equal(load_delta(original, tmp_path / "delta").eval()(ids).logits, expected)


def test_bad_options_and_places_are_refused_before_anything_is_written(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for error, match, options in (
        (OptionError, "lora_dropout=1", {"lora_dropout": 1.0}),
        (OptionError, "scaling=-0.5", {"lora_alpha": -4}),
        (OptionError, "scaling=nan", {"lora_alpha": float("nan")}),
        (OptionError, "task_type='SFT': choose one of CAUSAL_LM", {"task_type": "SFT"}),
        (OptionError, "no such model for model_type 'bert'", {"task_type": "SEQ_2_SEQ_LM"}),
    ):
        with pytest.raises(error, match=match):
            export_residual(minilm, minilm_factors, out, **options)
    with pytest.raises(CheckpointError, match="a single file; give the model's folder"):
        export_residual(minilm / "model.safetensors", minilm_factors, out)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputError, match="already there"):
        export_delta(minilm, minilm_factors, out)
    with pytest.raises(OutputError, match="cannot write"):
        export_delta(minilm, minilm_factors, out / "mine" / "deeper")


def test_a_failure_in_the_middle_leaves_nothing(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        export_residual(minilm, minilm_factors, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_warns_where_the_residual_loses_the_weight_to_rounding(sharded: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"torch\.bfloat16 rounds away about"):
        export_residual(sharded, factorize(sharded, start=inilora_alpha), tmp_path / "out")


def test_rows_of_every_head(tmp_path: Path) -> None:
    """Query rows of a weight that mixes heads (GPT-NeoX) are taken out where they are, whatever the strip."""
    torch.manual_seed(0)
    W, A, B = torch.randn(24, 6), torch.randn(2, 6), torch.randn(8, 2)
    part = Factors(A, B, Certificate(0.0, 0.0, 1.0, 0), source_sha256="", rows=(0, 2, 6))
    expected = W.clone()
    expected[row_index(part.rows, 24)] -= B @ A
    residual = _Residual([part], 24)
    assert torch.equal(torch.cat([residual.rows(start, W[start : start + 5]) for start in range(0, 24, 5)]), expected)


def compiled_layer(model: Any) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def checkpointed_layers(model: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda part: type(part).__name__ == "LlamaDecoderLayer")
    return model


class Holder(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)


WRAPPERS: dict[str, Any] = {
    "nothing": lambda model: model,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile of parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "parallel, averaged": lambda model: AveragedModel(nn.DataParallel(model)),
    "a compiled layer": compiled_layer,
    "checkpointed layers": checkpointed_layers,
    "a module that holds it": Holder,
    "a compiled one that does": lambda model: torch.compile(Holder(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_attached_model_is_saved_under_the_original_models_names(
    llama: Path, factors: FactorSet, tmp_path: Path, wrap: Any
) -> None:
    model = wrap(attach(load(llama), factors, scaling=2.0))
    trained = change(model)
    save_adapter(model, tmp_path / "trained", llama)
    convert(tmp_path / "trained", factors, tmp_path / "lora")
    assert (trained - logits(load(llama))).abs().max() > 0.1
    for name in ("trained", "lora"):
        loaded = PeftModel.from_pretrained(load(llama), tmp_path / name)
        assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)


def test_what_is_trained_next_to_the_model_keeps_the_holders_names(
    llama: Path, factors: FactorSet, tmp_path: Path
) -> None:
    model = Holder(attach(load(llama), factors))
    model.classifier = nn.Linear(4, 2)
    trained = change(model)
    with pytest.warns(
        UserWarning, match="classifier.weight and 1 more is trained and is no part of LlamaForCausalLM"
    ) as seen:
        save_adapter(model, tmp_path / "trained", llama)
    assert seen[0].filename == __file__
    original = Holder(load(llama))
    original.classifier = nn.Linear(4, 2)
    loaded = PeftModel.from_pretrained(original, tmp_path / "trained")
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)
    assert torch.equal(loaded.get_base_model().classifier.modules_to_save["default"].weight, model.classifier.weight)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_learned_after_a_cast_is_saved_as_it_is(
    llama: Path, factors: FactorSet, tmp_path: Path, form: Any
) -> None:
    """A0 and B0 are the cast ones then, which the factors alone do not tell."""
    model = attach(load(llama), factors, form=form).bfloat16()
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
        parameter.data.add_(1e-4 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "trained", llama)
    convert(tmp_path / "trained", factors, tmp_path / "lora")
    saved = safetensors.torch.load_file(tmp_path / "lora/adapter_model.safetensors")
    for name, layer in adapters(model):
        A, B = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert float((B @ A - layer.delta()).norm() / layer.delta().norm()) < 1e-5


def test_what_a_lora_has_no_place_for_is_refused_when_it_is_saved(
    llama: Path, factors: FactorSet, minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    model = attach(AutoModel.from_pretrained(minilm), minilm_factors)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    with pytest.raises(TargetError, match=r"layer\.0\.attention\.self\.query\.bias: it is trained, .* no place"):
        save_adapter(model, tmp_path / "out", minilm)
    whole = attach(load(llama), factors).requires_grad_(True)
    with pytest.raises(TargetError, match=r"q_proj\.weight: it is trained, .* save the whole model"):
        save_adapter(whole, tmp_path / "out", llama)
    around = attach(load(llama), factors)
    around.model.gate = nn.Parameter(torch.ones(1))
    with pytest.raises(TargetError, match=r"model\.gate: it is trained"):
        save_adapter(around, tmp_path / "out", llama)
    assert not list(tmp_path.iterdir())
