"""Faults that users of LoRA tools reported, on the way over disk: what would be wrong at the end is refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MPNetConfig, MPNetModel

from inilora_kernels.adapters import model_copy
from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.export import _Residual, export_delta, export_residual
from inilora_kernels.adapters.plan import _all_but
from inilora_kernels.errors import FactorFileError, OptionError, TargetError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Certificate, Factors
from inilora_kernels.model.architecture import describe
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.fused import row_index
from inilora_kernels.model.targets import find_targets

from ..factorized import factorize
from .architectures import EXPERTS, GROUPED, MAMBA, QWEN35

IDS = torch.arange(1, 11)[None]


def save(name: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**options)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS)[0]  # type: ignore[no-any-return]


def train(model: Any) -> torch.Tensor:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(IDS)[0] - 1).square().mean().backward()
        optimizer.step()
    return logits(model)


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


def test_another_class_than_the_exported_one_is_an_error_and_no_warning(llama: Path, tmp_path: Path) -> None:
    """LlamaFactory 10294: an adapter whose names match nothing trained a fresh LoRA on R."""
    export_residual(llama, factorize(llama, ("q_proj", "v_proj"), rank=2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"modules were (excluded|targeted)"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert _all_but(["q_proj"]) is None


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
    with pytest.warns(UserWarning, match=r"experts.*takes no adapter"):
        targets = find_targets(open_checkpoint(base), "all-linear")
    assert {target.module.split(".")[-1] for target in targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(TargetError, match="cannot get an adapter"):
        export_delta(base, factorize(base, ("experts.0.gate_proj",), rank=2), tmp_path / "out")


def test_mambas_modules_that_peft_refuses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save("MambaForCausalLM", tmp_path / "base", **MAMBA)
    with pytest.raises(TargetError, match=r"PEFT does not take these modules.*out_proj"):
        export_residual(base, factorize(base, ("in_proj", "out_proj"), rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_a_shared_embedding_of_which_one_was_trained(tmp_path: Path, trained: str) -> None:
    """peft 2777: merged, the other one changed too, and the output was off by 3.8."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "b"
    )
    factors = factorize(tmp_path / "b", ("q_proj", "v_proj"), rank=2)
    export_residual(tmp_path / "b", factors, tmp_path / "out")
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out/base"),
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], modules_to_save=[trained]),
    )
    for name, tensor in load_peft_weights(str(tmp_path / "out/adapter")).items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(tensor)
    expected = train(model)
    model.save_pretrained(tmp_path / "trained")
    export_merged(tmp_path / "trained", factors, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-4)
    assert not torch.equal(merged.model.embed_tokens.weight, merged.lm_head.weight)


def test_a_weight_that_two_modules_share_gets_no_residual(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "tied")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(TargetError, match=r"its weight is also that of .*embed_tokens"):
        export_residual(tmp_path / "tied", factorize(tmp_path / "tied", ("lm_head",), rank=2), tmp_path / "out")


def test_a_merged_folder_with_a_copy_of_the_record_is_no_residual(llama: Path, tmp_path: Path) -> None:
    """axolotl merge-lora copies every file of the base folder: the next stage could neither convert nor merge."""
    factors = factorize(llama, ("q_proj", "v_proj"), rank=2)
    export_residual(llama, factors, tmp_path / "out")
    record = tmp_path / "out/base/inilora_residual.json"
    second = shutil.copytree(llama, tmp_path / "merged")
    shutil.copy(record, second)
    next_factors = factorize(second, ("q_proj", "v_proj"), rank=4)
    export_delta(second, next_factors, tmp_path / "next")
    convert(tmp_path / "next/adapter", next_factors, tmp_path / "lora")
    export_merged(tmp_path / "next/adapter", next_factors, tmp_path / "again")
    assert not (tmp_path / "again/inilora_residual.json").exists()
    for damage in ("{", "[]", json.dumps({"base": 5}), "[" * 10_000):
        record.write_text(damage)
        with pytest.raises(FactorFileError, match="damaged"):
            convert(tmp_path / "out/adapter", factors, tmp_path / "no")


def test_a_part_of_the_modules_trained_alone(llama: Path, tmp_path: Path) -> None:
    """peft 1024: frozen towers and layers_to_transform."""
    factors = factorize(llama, ("q_proj", "v_proj"), rank=2)
    part = FactorSet({name: one for name, one in factors.items() if ".0." in name}, {})
    export_delta(llama, part, tmp_path / "delta")
    convert(tmp_path / "delta/adapter", factors, tmp_path / "lora")
    assert len(load_peft_weights(str(tmp_path / "lora"))) == 4
    export_residual(llama, factors, tmp_path / "residual")
    adapter = tmp_path / "residual/adapter/adapter_model.safetensors"
    tensors = {name: one for name, one in load_file(adapter).items() if ".0." in name}
    save_file(tensors, adapter)
    with pytest.raises(FactorFileError, match="trained on another model than the original"):
        convert(tmp_path / "residual/adapter", factors, tmp_path / "no")


def test_task_types_that_do_not_fit_say_what_does(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    """peft 1988: refused, without a word that leaving it out works."""
    with pytest.raises(OptionError, match="leave task_type out"):
        export_delta(minilm, minilm_factors, tmp_path / "out", task_type="SEQ_2_SEQ_LM")


def test_a_broken_installation_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((llama / "config.json").read_text())
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    monkeypatch.setattr(transformers, "LlamaForCausalLM", property(lambda _: 1 / 0), raising=False)
    with pytest.warns(UserWarning, match=r"transformers .* cannot build LlamaForCausalLM"):
        assert describe(config, ["model.layers.0.self_attn.q_proj"]) is None


def test_no_code_of_the_models_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json with auto_map: transformers asks on standard input, and a y there ran the folder's code."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    config = {
        "model_type": "blip_text_model",
        "auto_map": {"AutoModel": "evil.Evil"},
        "_name_or_path": str(tmp_path),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        describe(config, ["0.q_proj"])
    assert not (tmp_path / "canary").exists()


def test_adapters_are_written_as_peft_writes_them(llama: Path, tmp_path: Path) -> None:
    factors = factorize(llama, ("q_proj", "v_proj"), rank=2)
    hub = shutil.copytree(llama, tmp_path / "hub/models--org--tiny/snapshots/0123")
    export_delta(hub, factors, tmp_path / "delta")
    config = json.loads((tmp_path / "delta/adapter/adapter_config.json").read_text())
    assert config["peft_version"] == __import__("peft").__version__
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    card = (tmp_path / "delta/adapter/README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "wrong" in card
    LoraConfig.from_pretrained(str(tmp_path / "delta/adapter"))


@pytest.mark.parametrize("strip_bytes", [100, 1 << 20])
def test_weights_are_changed_strip_by_strip(
    gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip_bytes: int
) -> None:
    """Rows of one matrix at a time, transposed and fused, whose parts begin and end within strips."""
    monkeypatch.setattr(model_copy, "_STRIP_BYTES", strip_bytes)
    export_residual(gpt2, gpt2_factors, tmp_path / "out")
    name = "transformer.h.1.attn.c_attn"
    W, R = (open_checkpoint(folder).read(f"{name}.weight") for folder in (gpt2, tmp_path / "out/base"))
    expected = W.clone()
    for part in ("query", "value"):
        one = gpt2_factors[f"{name}:{part}"]
        expected[:, slice(*(one.rows or ()))] -= one.product().T
    assert torch.allclose(R, expected, rtol=0, atol=1e-6)
    adapter = tmp_path / "out/adapter/adapter_model.safetensors"
    tensors = load_file(adapter)
    save_file({key: one * 1.5 if "lora_B" in key else one for key, one in tensors.items()}, adapter)
    config = tmp_path / "out/adapter/adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "out/base")})
    )
    export_merged(tmp_path / "out/adapter", gpt2_factors, tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged").read(f"{name}.weight")
    assert torch.allclose(merged, W + 0.5 * (W - R), rtol=0, atol=1e-5)


def test_rows_of_every_head(tmp_path: Path) -> None:
    """Query rows of a weight that mixes heads (GPT-NeoX) are taken out where they are, whatever the strip."""
    torch.manual_seed(0)
    W, A, B = torch.randn(24, 6), torch.randn(2, 6), torch.randn(8, 2)
    part = Factors(A, B, Certificate(0.0, 0.0, 1.0, 0), source_sha256="", rows=(0, 2, 6))
    expected = W.clone()
    expected[row_index(part.rows, 24)] -= B @ A
    residual = _Residual([part], 24)
    assert torch.equal(torch.cat([residual.rows(start, W[start : start + 5]) for start in range(0, 24, 5)]), expected)


@pytest.mark.parametrize("lora_alpha", [1e90, 1e308, 1e-308])
def test_a_scaling_that_leaves_float32_is_refused(llama: Path, tmp_path: Path, lora_alpha: float) -> None:
    with pytest.raises(OptionError, match="float32's range"):
        export_residual(llama, factorize(llama, ("q_proj",), rank=2), tmp_path / "out", lora_alpha=lora_alpha)


def test_nan_is_refused_wherever_it_comes_from(llama: Path, tmp_path: Path) -> None:
    factors = factorize(llama, ("q_proj",), rank=2)
    export_delta(llama, factors, tmp_path / "delta")
    first = next(iter(factors))
    broken = FactorSet({**factors, first: replace(factors[first], A=factors[first].A * float("nan"))}, {})
    with pytest.raises(FactorFileError, match="hold NaN or Inf"):
        export_residual(llama, broken, tmp_path / "out")
    file = tmp_path / "delta/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if "lora_B" in key)][0, 0] = float("nan")
    save_file(tensors, file)
    for act in (convert, export_merged):
        with pytest.raises(FactorFileError, match="holds NaN or Inf"):
            act(tmp_path / "delta/adapter", factors, tmp_path / "out")
