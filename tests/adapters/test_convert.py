from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel

from inilora_kernels.adapters.convert import convert, export_merged, recompress
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.adapters.peft import initialize_peft, load_delta
from inilora_kernels.errors import FactorFileError, OptionError, OutputError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize, inilora_alpha


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids)[0]


def train(model: nn.Module, vocabulary: int = 30_000) -> nn.Module:
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (model(ids)[0] - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def live(minilm: Path, factors: FactorSet, form: str = "delta", **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 8, "target_modules": ["query", "value"], **options})
    return initialize_peft(get_peft_model(AutoModel.from_pretrained(minilm), config), factors, form=form)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora_alpha": {"lora_alpha": 32},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    # path_initial_model_for_weight_conversion refuses rslora with patterns.
    "rslora and patterns": {
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"layer.0.attention.self.query": 3},
        "alpha_pattern": {"value": 2, "layer.0.attention.self.query": 11},
    },
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("start", ["svd", "alpha"])
def test_a_trained_adapter_becomes_a_plain_lora_on_the_original_base(
    minilm: Path, tmp_path: Path, options: dict[str, Any], form: str, start: str
) -> None:
    """peft 1929: wrong output after reload, with rslora."""
    making = {"start": inilora_alpha} if start == "alpha" else {}
    modules = dict(factorize(minilm, **making))
    if "rank_pattern" in options:
        modules.update(factorize(minilm, ("layer.0.attention.self.query",), rank=3, **making))
    factors = FactorSet(modules, {})
    model = train(live(minilm, factors, form, **options))
    trained = output(model)
    original = AutoModel.from_pretrained(minilm)
    assert (trained - output(original)).abs().max() > 0.1
    model.save_pretrained(tmp_path / "trained")
    errors = convert(tmp_path / "trained", factors, tmp_path / "lora")
    assert set(errors.values()) == {0.0}
    assert len(errors) == 12
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == str(minilm)
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora")
    # The residual form of α's factors rounds entries 35 times as large as W's.
    atol = 1e-3 if (form, start) == ("residual", "alpha") else 1e-4
    assert torch.allclose(output(reloaded), trained, rtol=0, atol=atol)
    assert torch.allclose(output(reloaded.merge_and_unload()), trained, rtol=0, atol=atol)
    export_merged(tmp_path / "trained", factors, tmp_path / "merged")
    assert torch.allclose(output(AutoModel.from_pretrained(tmp_path / "merged")), trained, rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_factors_kept_in_bfloat16_are_taken_as_they_were_trained(
    minilm: Path, minilm_alpha: FactorSet, tmp_path: Path, form: str
) -> None:
    """TRL casts A and B to bfloat16 on a quantized base: α's A0 and B0 in float32 are not what they started from."""
    config = LoraConfig(r=8, lora_alpha=3, target_modules=["query", "value"])
    base = AutoModel.from_pretrained(minilm)
    W = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    initialize_peft(model, minilm_alpha, form=form)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", minilm_alpha, tmp_path / "lora")
    lora = load_peft_weights(str(tmp_path / "lora"))
    for module in minilm_alpha:
        key = f"base_model.model.{module}.lora_"
        update = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        assert not update.any()
    for module in minilm_alpha:
        layer = model.get_base_model().get_submodule(module)
        weight = layer.base_layer.weight
        if form == "residual":  # not by peft's merge, which multiplies in bfloat16
            weight = weight + 3 / 8 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        assert torch.allclose(weight, W[f"{module}.weight"], rtol=0, atol=0 if form == "delta" else 1e-5)


def test_both_forms_on_disk_convert(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    export_residual(minilm, minilm_factors, tmp_path / "residual", lora_alpha=16)
    base = AutoModel.from_pretrained(tmp_path / "residual/base")
    residual = PeftModel.from_pretrained(base, tmp_path / "residual/adapter", is_trainable=True)
    export_delta(minilm, minilm_factors, tmp_path / "delta", lora_alpha=16)
    delta = load_delta(AutoModel.from_pretrained(minilm), tmp_path / "delta")
    for name, model in (("residual", residual), ("delta", delta)):
        trained = output(train(model))
        model.save_pretrained(tmp_path / name / "trained")
        convert(tmp_path / name / "trained", minilm_factors, tmp_path / name / "lora")
        reloaded = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / name / "lora")
        assert torch.allclose(output(reloaded), trained, rtol=0, atol=1e-4)
        export_merged(tmp_path / name / "trained", minilm_factors, tmp_path / name / "merged")
        merged = AutoModel.from_pretrained(tmp_path / name / "merged")
        assert torch.allclose(output(merged), trained, rtol=0, atol=1e-4)
        kept = {file.name for file in minilm.iterdir() if not file.name.startswith(".")}
        assert {file.name for file in (tmp_path / name / "merged").iterdir()} == kept


def test_converted_adapters_take_turns_on_one_base(llama: Path, tmp_path: Path) -> None:
    """peft 2270: adapters converted from PiSSA gave other results in a loop than each alone; peft 2184: a plain LoRA
    next to them gave garbage."""
    ids = torch.arange(20)[None]
    factors = {"delta": factorize(llama, ("q_proj", "v_proj"), rank=4)}
    factors["residual"] = factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    alone = {}
    for seed, name in enumerate(("delta", "residual", "plain")):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        if name in factors:
            initialize_peft(model, factors[name], form=name)
        alone[name] = train(model, vocabulary=64)(ids).logits
        model.save_pretrained(tmp_path / name)
        if name in factors:
            convert(tmp_path / name, factors[name], tmp_path / f"{name} lora")
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    expected = base(ids).logits
    model = PeftModel.from_pretrained(base, tmp_path / "plain", adapter_name="plain")
    for name in factors:
        model.load_adapter(tmp_path / f"{name} lora", name)
    for name in ("residual", "plain", "delta", "plain", "residual"):
        model.set_adapter(name)
        # α's residual has entries of about 1, summed in float32.
        assert torch.allclose(model.eval()(ids).logits, alone[name], rtol=0, atol=1e-4), name
        assert (alone[name] - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)


def test_an_adapter_in_bfloat16_from_a_residual_folder(llama: Path, tmp_path: Path) -> None:
    """Unsloth, Axolotl and torchtune may save bfloat16; its residual is that of the float32 factors all the same."""
    factors = factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha)
    export_residual(llama, factors, tmp_path / "residual")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "residual/base")
    model = PeftModel.from_pretrained(base, tmp_path / "residual/adapter", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path / "trained")
    model.float()
    config_file = tmp_path / "trained/adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": None}))  # as torchtune leaves it
    convert(tmp_path / "trained", factors, tmp_path / "lora", base=tmp_path / "residual/base")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "lora")
    ids = torch.arange(20)[None]
    # A residual with entries of about 1, summed in float32.
    assert torch.allclose(reloaded.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)


def test_an_untrained_adapter_converts_to_nothing_at_all(minilm: Path, minilm_alpha: FactorSet, tmp_path: Path) -> None:
    live(minilm, minilm_alpha, lora_alpha=4).save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", minilm_alpha, tmp_path / "lora")
    original = AutoModel.from_pretrained(minilm)
    expected = output(original)
    assert torch.equal(output(PeftModel.from_pretrained(original, tmp_path / "lora")), expected)
    export_merged(tmp_path / "trained", minilm_alpha, tmp_path / "merged")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (minilm / name).read_bytes()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.[qv]_proj"], ids=["names", "regular expression"])
def test_servers_accept_the_names_and_the_config(llama: Path, tmp_path: Path, targets: str | list[str]) -> None:
    """What the loaders of vLLM and SGLang ask for, as their sources say.

    vLLM parses a key as base_model.model.{module}.lora_A.weight or lora_B.weight, refuses modules_to_save, and takes
    r and lora_alpha (and rslora) for all modules alike. SGLang finds the layer as `layers.N.`, wants target_modules as
    a list whose last parts are the projections' names, and takes scaling lora_alpha / r.
    """
    factors = factorize(llama, ("q_proj", "v_proj"), rank=4)
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=targets)
    model = initialize_peft(get_peft_model(model, config), factors)
    train(model, vocabulary=64).save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora")
    tensors = load_peft_weights(str(tmp_path / "lora"))
    key = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qv])_proj\.lora_([AB])\.weight")
    shapes = {("q", "A"): (8, 32), ("q", "B"): (32, 8), ("v", "A"): (8, 32), ("v", "B"): (16, 8)}
    assert len(tensors) == 8
    for name, tensor in tensors.items():
        match = key.fullmatch(name)
        assert match
        assert tensor.shape == shapes[match[2], match[3]]
        assert tensor.dtype == torch.float32
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"], written["use_rslora"], written["use_dora"]) == (8, 8, False, False)
    assert (written["rank_pattern"], written["alpha_pattern"], written["modules_to_save"]) == ({}, {}, None)
    assert isinstance(written["target_modules"], list)
    assert {name.split(".")[-1] for name in written["target_modules"]} == {"q_proj", "v_proj"}
    kept = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {file.name for file in (tmp_path / "lora").iterdir()} == kept
    original = AutoModelForCausalLM.from_pretrained(llama)
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora").eval()
    ids = torch.arange(20)[None]
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_recompression_is_the_truncated_svd_and_says_its_error(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    model = train(live(minilm, minilm_factors, lora_alpha=16))
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", minilm_factors, tmp_path / "full")
    errors = convert(tmp_path / "trained", minilm_factors, tmp_path / "small", rank=4)
    full, small = (load_peft_weights(str(tmp_path / name)) for name in ("full", "small"))
    for module, error in errors.items():
        key = f"base_model.model.{module}.lora_"
        update = full[f"{key}B.weight"].double() @ full[f"{key}A.weight"].double()
        kept = small[f"{key}B.weight"].double() @ small[f"{key}A.weight"].double()
        S = torch.linalg.svdvals(update)
        assert small[f"{key}A.weight"].shape == (4, 384)
        assert error == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-6)
        assert float((update - kept).norm() / update.norm()) == pytest.approx(error, rel=1e-4)
        assert 0 < error < 1
    lossless = convert(tmp_path / "trained", minilm_factors, tmp_path / "wide", rank=20)
    assert max(lossless.values()) == 0.0
    reloaded = PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), tmp_path / "wide")
    assert torch.allclose(output(reloaded), output(model), rtol=0, atol=1e-4)


def test_recompressing_nothing_gives_nothing() -> None:
    A, B, error = recompress(torch.zeros(2, 5), torch.zeros(4, 2), 1)
    assert not A.any()
    assert not B.any()
    assert error == 0.0


def test_gpt2s_conv1d_with_a_fused_weight(gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2), config)
    train(initialize_peft(model, gpt2_factors), vocabulary=64)
    ids = torch.arange(20)[None]
    trained = model(ids).logits
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", gpt2_factors, tmp_path / "lora")
    original = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    assert (original(ids).logits - trained).abs().max() > 1e-2
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora").eval()
    assert torch.allclose(reloaded(ids).logits, trained, rtol=0, atol=1e-5)
    export_merged(tmp_path / "trained", gpt2_factors, tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, trained, rtol=0, atol=1e-5)


def test_modules_trained_whole_come_along(minilm: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    factors = factorize(minilm)  # its names have no `bert.`, the base's tensors have
    config = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = train(initialize_peft(get_peft_model(base, config), factors))
    trained = output(model)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora")
    export_merged(tmp_path / "trained", factors, tmp_path / "merged")
    original = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    head = original.classifier.weight.clone()
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora")
    assert torch.allclose(output(reloaded), trained, rtol=0, atol=1e-4)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(output(merged), trained, rtol=0, atol=1e-4)
    assert not torch.equal(merged.classifier.weight, head)
    with pytest.raises(FactorFileError, match=r"no tensor classifier\.bias .*merge_and_unload"):
        export_merged(tmp_path / "trained", factors, tmp_path / "headless", base=minilm)


def test_factors_that_do_not_belong_are_refused(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    other = tmp_path / "other"
    AutoModel.from_pretrained(minilm).to(torch.bfloat16).save_pretrained(other)
    train(live(minilm, minilm_factors)).save_pretrained(tmp_path / "trained")
    wrong = factorize(other)
    # A and B alone, as a trainer that does not know this library saves them.
    alone = tmp_path / "alone"
    plain = get_peft_model(AutoModel.from_pretrained(minilm), LoraConfig(r=8, target_modules=["query", "value"]))
    for module, part in minilm_factors.items():
        layer = plain.get_base_model().get_submodule(module)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = part.A.clone(), part.B.clone()
    plain.save_pretrained(alone)
    for act in (convert, export_merged):
        with pytest.raises(
            FactorFileError, match=r"query\.weight is not the weight that these factors were computed from"
        ):
            act(tmp_path / "trained", wrong, tmp_path / "out")
        with pytest.raises(FactorFileError, match="is not the weight"):
            act(tmp_path / "trained", minilm_factors, tmp_path / "out", base=other)
        with pytest.raises(FactorFileError, match=r"did not start from these factors.*no linear module"):
            act(tmp_path / "trained", factorize(minilm, ("key", "value")), tmp_path / "out")
        with pytest.raises(FactorFileError, match="query and 5 more of its modules have no factors"):
            act(tmp_path / "trained", factorize(minilm, ("value",)), tmp_path / "out")
        with pytest.raises(FactorFileError, match="has rank 16, the factors have 4"):
            act(tmp_path / "trained", factorize(minilm, rank=4), tmp_path / "out")
        with pytest.raises(FactorFileError, match="a plain LoRA already, which started from other factors"):
            act(tmp_path / "trained", factorize(minilm, start=inilora_alpha), tmp_path / "out")
        with pytest.raises(FactorFileError, match=r"neither its A nor its BA is near .*insist"):
            act(alone, factorize(minilm, start=inilora_alpha), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(alone, factorize(minilm, start=inilora_alpha), tmp_path / "out", insist=True)


def test_what_is_no_trained_lora_is_refused(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    live(minilm, minilm_factors).save_pretrained(trained)
    with pytest.raises(OptionError, match="rank=0"):
        convert(trained, minilm_factors, tmp_path / "out", rank=0)
    with pytest.raises(OptionError, match="rank=100000: no update of this adapter has a rank above 384"):
        convert(trained, minilm_factors, tmp_path / "out", rank=100_000)
    with pytest.raises(OutputError, match="already there"):
        convert(trained, minilm_factors, trained)
    with pytest.raises(FactorFileError, match=r"no such file; give the folder with adapter_config\.json"):
        convert(minilm, minilm_factors, tmp_path / "out")
    config_file = trained / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(OptionError, match=r"cannot find the original model .*gone"):
        convert(trained, minilm_factors, tmp_path / "out")
    convert(trained, minilm_factors, tmp_path / "found", base=minilm)
    config_file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(FactorFileError, match="not a plain LoRA"):
        convert(trained, minilm_factors, tmp_path / "out")
    config_file.write_text("{")
    with pytest.raises(FactorFileError, match=r"adapter_config\.json: damaged"):
        convert(trained, minilm_factors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
