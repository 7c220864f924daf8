from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, GPT2LMHeadModel

from inilora_kernels.adapters.export import _Residual, export_delta, export_residual
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import CheckpointError, OptionError, OutputError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Certificate, Factors
from inilora_kernels.model.fused import row_index

from ..factorized import factorize, inilora_alpha
from .models import output

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


def test_plain_peft_loads_the_delta_as_two_adapters(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    export_delta(minilm, minilm_factors, tmp_path / "out", lora_alpha=4)
    base = AutoModel.from_pretrained(minilm)
    expected = output(base)
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter", is_trainable=True)
    model.load_adapter(tmp_path / "out/initial", "initial")
    model.base_model.set_adapter(["default", "initial"])
    model.set_requires_grad("initial", requires_grad=False)
    assert (output(model) - expected).abs().max() < 2e-5
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_merging_the_frozen_adapter_makes_the_residual_in_memory(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    """What LLaMA-Factory does with `adapter_name_or_path: OUT/initial,OUT/adapter`."""
    export_delta(minilm, minilm_factors, tmp_path / "out")
    base = AutoModel.from_pretrained(minilm)
    expected = output(base)
    residual = PeftModel.from_pretrained(base, tmp_path / "out/initial").merge_and_unload()
    assert (output(residual) - expected).abs().max() > 0.1
    model = PeftModel.from_pretrained(residual, tmp_path / "out/adapter", is_trainable=True)
    assert (output(model) - expected).abs().max() < 2e-5


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
