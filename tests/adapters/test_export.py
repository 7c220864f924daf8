from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import CheckpointError, FactorFileError, OptionError, OutputError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.model.checkpoint import open_checkpoint

from ..factorized import factorize, inilora_alpha

QUERY = "encoder.layer.0.attention.self.query"


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def sharded(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in bfloat16, in shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModel.from_pretrained(minilm, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


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


def test_only_the_targets_change_in_the_residual(minilm: Path, sharded: Path, tmp_path: Path) -> None:
    factors = factorize(sharded)
    export_residual(sharded, factors, tmp_path / "out")
    before, after = files(sharded), files(tmp_path / "out/base")
    assert after.keys() - before.keys() == {"inilora_residual.json"}
    assert before.keys() <= after.keys()
    assert all(after[name] == before[name] for name in before if not name.endswith(".safetensors"))
    source, residual = open_checkpoint(sharded), open_checkpoint(tmp_path / "out/base")
    assert {name: (entry.file.name, entry.offset, entry.dtype) for name, entry in source.tensors.items()} == {
        name: (entry.file.name, entry.offset, entry.dtype) for name, entry in residual.tensors.items()
    }
    for name in source.tensors:
        W, R = source.read(name), residual.read(name)
        if (module := name.removesuffix(".weight")) in factors:
            assert torch.equal(R, (W.float() - factors[module].product()).bfloat16())
        else:
            assert torch.equal(W, R), name


def test_a_torch_bin_becomes_safetensors(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((minilm / "config.json").read_bytes())
    tensors = load_file(minilm / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard, half in (("1", names[:50]), ("2", names[50:])):
        file = f"pytorch_model-0000{shard}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, source / file)
        weight_map.update(dict.fromkeys(half, file))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_residual(source, minilm_factors, tmp_path / "out")
    assert sorted(files(tmp_path / "out/base")) == [
        "config.json",
        "inilora_residual.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    base = AutoModel.from_pretrained(tmp_path / "out/base")
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
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
        expected = output(AutoModel.from_pretrained(minilm, dtype=dtype))
        model = load_delta(AutoModel.from_pretrained(minilm, dtype=dtype), tmp_path / "out")
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


@pytest.mark.parametrize("use_rslora", [False, True])
def test_modules_of_several_ranks_have_the_same_scaling(minilm: Path, tmp_path: Path, use_rslora: bool) -> None:
    factors = FactorSet({**factorize(minilm, rank=8), **factorize(minilm, (QUERY,), rank=3)}, {})
    export_residual(minilm, factors, tmp_path / "out", lora_alpha=4, use_rslora=use_rslora)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert (output(model) - output(AutoModel.from_pretrained(minilm))).abs().max() < 2e-5
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert sorted({layer.r["default"] for layer in layers}) == [3, 8]
    scalings = {layer.scaling["default"] for layer in layers}
    assert max(scalings) - min(scalings) < 1e-12
    assert min(scalings) == pytest.approx(4 / 8**0.5 if use_rslora else 0.5)


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


def test_names_and_head_are_those_of_the_model_that_the_task_needs(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    """MiniLM's file has no `bert.`, a BertForSequenceClassification has: PEFT would find none of the keys."""
    with pytest.raises(OptionError, match="no head in it for this task"):
        export_delta(minilm, minilm_factors, tmp_path / "out", task_type="SEQ_CLS")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3).save_pretrained(tmp_path / "base")
    expected = output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    export_delta(tmp_path / "base", minilm_factors, tmp_path / "delta", task_type="SEQ_CLS")
    export_residual(tmp_path / "base", minilm_factors, tmp_path / "residual", task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = load_delta(base, tmp_path / "delta")
    assert torch.equal(output(model), expected)
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
    assert torch.equal(layer.lora_A["default"].weight, minilm_factors[QUERY].A)
    assert {"classifier"} == {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} - {"bert"}
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "residual/adapter")
    assert (output(model) - expected).abs().max() < 2e-5


def test_a_model_with_a_prefix_in_memory_alone(gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path) -> None:
    """GPT-2's old files have no `transformer.`: PEFT's keys need it all the same."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    tensors = load_file(gpt2 / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, old / "model.safetensors"
    )
    factors = FactorSet({name.removeprefix("transformer."): part for name, part in gpt2_factors.items()}, {})
    export_delta(old, factors, tmp_path / "out")
    assert all(".transformer.h." in key for key in load_file(tmp_path / "out/adapter/adapter_model.safetensors"))
    ids = torch.arange(20)[None]
    model = load_delta(GPT2LMHeadModel.from_pretrained(old), tmp_path / "out").eval()
    assert torch.equal(model(ids).logits, GPT2LMHeadModel.from_pretrained(gpt2).eval()(ids).logits)


def test_targets_are_named_so_that_no_other_module_is_meant(minilm: Path, tmp_path: Path) -> None:
    # "dense" alone would be the output layers and the pooler too.
    export_delta(minilm, factorize(minilm, ("intermediate.dense",)), tmp_path / "some")
    config = json.loads((tmp_path / "some/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["intermediate.dense"]
    export_delta(minilm, factorize(minilm, (QUERY,)), tmp_path / "one")
    config = json.loads((tmp_path / "one/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == [QUERY]


def test_factors_of_another_model_are_refused(minilm: Path, sharded: Path, gpt2: Path, tmp_path: Path) -> None:
    factors = factorize(sharded)
    for export in (export_residual, export_delta):
        with pytest.raises(FactorFileError, match=r"query\.weight is not the weight that these factors were made of"):
            export(minilm, factors, tmp_path / "out")
        with pytest.raises(FactorFileError, match=r"not of this model.*no linear module"):
            export(gpt2, factors, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_options_and_places_are_refused_before_anything_is_written(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for error, match, options in (
        (OptionError, "lora_dropout=1", {"lora_dropout": 1.0}),
        (OptionError, "scaling=-0.5", {"lora_alpha": -4}),
        (OptionError, "scaling=nan", {"lora_alpha": float("nan")}),
        (OptionError, "task_type='SFT': it is one of CAUSAL_LM", {"task_type": "SFT"}),
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
