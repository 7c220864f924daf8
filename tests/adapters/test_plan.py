"""What an export is going to write: names, ranks, scaling, the class and the head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetModel,
)

from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import OptionError, TargetError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from ..factorized import factorize
from .architectures import EXPERTS, GROUPED, QWEN35
from .models import QUERY, logits, output, save, train


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


def test_names_and_head_are_those_of_the_model_that_the_task_needs(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    """MiniLM's file has no `bert.`, but BertForSequenceClassification has: PEFT would find none of the keys."""
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


def test_the_text_model_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    """LlamaFactory 10294, vllm 39369: names on disk are not those of the text model, and PEFT only warned."""
    base = save("Qwen3_5ForConditionalGeneration", tmp_path / "base", **QWEN35)
    factors = factorize(base, ("q_proj", "v_proj"), rank=2)
    export_residual(base, factors, tmp_path / "out", task_type="CAUSAL_LM")
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    model = PeftModel.from_pretrained(text, tmp_path / "out/adapter", is_trainable=True)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)
    trained = train(model)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert torch.allclose(logits(reloaded), trained, rtol=0, atol=1e-4)


def test_layers_for_multi_token_prediction_are_no_targets(tmp_path: Path) -> None:
    """vllm 34888, ms-swift 9802: the checkpoint has a layer more than the model loads."""
    options = {**GROUPED, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}
    base = save("Glm4MoeForCausalLM", tmp_path / "base", **options)
    tensors = load_file(base / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): one.clone() for name, one in tensors.items() if ".layers.1." in name
    }
    save_file({**tensors, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(base)
    with pytest.warns(UserWarning, match=r"left out model\.layers\.2\.self_attn\.q_proj.*does not load it"):
        targets = find_targets(checkpoint)
    assert {target.module.split(".")[2] for target in targets} == {"0", "1"}
    factors = factorize(base, ("layers.2.self_attn.q_proj",), rank=2)
    with pytest.raises(TargetError, match="loads none of the modules"):
        export_residual(base, factors, tmp_path / "out")


def test_experts_are_refused_by_name_and_left_out_otherwise(tmp_path: Path) -> None:
    """peft 3009: factors of experts trained, and nothing could convert them."""
    base = save("Qwen3MoeForCausalLM", tmp_path / "base", **GROUPED, **EXPERTS, num_experts=4)
    with pytest.raises(TargetError, match=r"gate_proj.*experts"):
        find_targets(open_checkpoint(base), ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.warns(UserWarning, match=r"experts.*target_parameters"):
        targets = find_targets(open_checkpoint(base), "all-linear")
    assert {target.module.split(".")[-1] for target in targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(TargetError, match="cannot get an adapter"):
        export_delta(base, factorize(base, ("experts.0.gate_proj",), rank=2), tmp_path / "out")


def test_a_stale_class_in_config_json(tmp_path: Path) -> None:
    """all-mpnet-base-v2: config.json says MPNetForMaskedLM, the file is the bare model, and AutoModel loads it."""
    options = {**GROUPED}
    del options["num_key_value_heads"], options["head_dim"]
    torch.manual_seed(0)
    MPNetModel(MPNetConfig(**options)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["MPNetForMaskedLM"]}))
    factors = factorize(tmp_path / "base", ("attn.q", "attn.v"), rank=2)
    export_residual(tmp_path / "base", factors, tmp_path / "out")
    expected = logits(AutoModel.from_pretrained(tmp_path / "base"))
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)


def test_a_weight_that_two_modules_share_gets_no_residual(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "tied")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(TargetError, match=r"its weight is also that of .*embed_tokens"):
        export_residual(tmp_path / "tied", factorize(tmp_path / "tied", ("lm_head",), rank=2), tmp_path / "out")


def test_task_types_that_do_not_fit_say_what_does(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    """peft 1988: refused, without saying that leaving it out works."""
    with pytest.raises(OptionError, match="leave task_type out"):
        export_delta(minilm, minilm_factors, tmp_path / "out", task_type="SEQ_2_SEQ_LM")


@pytest.mark.parametrize("lora_alpha", [1e90, 1e308, 1e-308])
def test_a_scaling_that_leaves_float32_is_refused(llama: Path, tmp_path: Path, lora_alpha: float) -> None:
    with pytest.raises(OptionError, match="float32's range"):
        export_residual(llama, factorize(llama, ("q_proj",), rank=2), tmp_path / "out", lora_alpha=lora_alpha)
