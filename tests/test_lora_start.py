"""One call from a model to a PeftModel that starts from its own weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from inilora_kernels import FactorSet, approximate_model, export_delta, load_delta, lora_config_of, lora_model
from inilora_kernels.errors import OptionError, TargetError

IDS = torch.arange(12).reshape(2, 6)


def test_a_rank_is_enough(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    expected = model(IDS).logits
    started = lora_model(model, rank=4, task_type="CAUSAL_LM")
    assert torch.equal(started(IDS).logits, expected)
    assert type(started).__name__ == "PeftModelForCausalLM"
    trained = [name for name, parameter in started.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(".lora_" in name and "_proj." in name for name in trained)


def test_factors_or_a_rank(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    for given in ({}, {"factors": 4, "rank": 4}):
        with pytest.raises(OptionError, match="either factors or a rank"):
            lora_model(model, **given)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_fused_names_become_one_target(gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path, form: str) -> None:
    """LlamaFactory #4020: names such as `c_attn:query` in a LoraConfig built by hand."""
    gpt2_factors.save(tmp_path / "factors.safetensors")
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    expected = model(IDS).logits
    started = lora_model(model, tmp_path / "factors.safetensors", form, lora_alpha=32, use_rslora=True)  # type: ignore[arg-type]
    config = started.peft_config["default"]
    assert (set(config.target_modules), config.r, config.lora_alpha) == ({"c_attn"}, 8, 32)
    # float32's rounding of R, through two layers.
    torch.testing.assert_close(started(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_callers_saved_folder_is_a_plain_lora_for_the_original(llama: Path, tmp_path: Path) -> None:
    started = lora_model(AutoModelForCausalLM.from_pretrained(llama), 4)
    optimizer = torch.optim.SGD([one for one in started.parameters() if one.requires_grad], lr=0.1)
    started(IDS, labels=IDS).loss.backward()
    optimizer.step()
    started.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    torch.testing.assert_close(plain(IDS).logits, started(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(transformers, "FalconH1Config"), reason="a newer transformers has Falcon-H1")
def test_what_peft_refuses_leaves_the_model_as_it_was() -> None:
    """PEFT adapts the layers before Mamba's out_proj, then raises a ValueError."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**sizes, **heads, **mamba)).eval()
    modules, expected = [type(module) for module in model.modules()], model(IDS).logits
    factors = approximate_model(
        model, rank=2, solver="krylov", target_modules="all-linear", cache=False, progress=False
    )
    with pytest.raises(TargetError, match=r"PEFT does not take these modules .*out_proj"):
        lora_model(model, factors)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(IDS).logits, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_refused_leaves_the_model_as_it_was(minilm: Path, gpt2_factors: FactorSet, llama: Path) -> None:
    model = AutoModel.from_pretrained(minilm)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError, match="no linear module"):
        lora_model(model, gpt2_factors)
    with pytest.raises(OptionError, match="lora_alpha=-1"):
        lora_config_of(model, gpt2_factors, lora_alpha=-1)
    with pytest.raises(OptionError, match="form='both'"):
        lora_model(model, 4, "both")  # type: ignore[arg-type]
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("started", [True, False])
def test_a_model_that_has_adapters_keeps_them(llama: Path, tmp_path: Path, form: str, started: bool) -> None:
    """A notebook's cell run twice: the trained adapter was taken out of the model, or started anew."""
    base = AutoModelForCausalLM.from_pretrained(llama)
    factors = approximate_model(base, rank=4, solver="krylov", cache=False, progress=False)
    export_delta(llama, factors, tmp_path / "delta")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = lora_model(base, factors, form) if started else peft.get_peft_model(base, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trained = model(IDS).logits
    for given in (model, model.get_base_model()):
        with pytest.raises(OptionError, match=r"has PEFT's adapters already.*unload\(\) first"):
            lora_model(given, factors, form)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="has PEFT's adapters already"):
            load_delta(given, tmp_path / "delta")
        assert torch.equal(model(IDS).logits, trained)
    model.save_pretrained(tmp_path / "trained")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "trained")
    torch.testing.assert_close(plain(IDS).logits, trained, rtol=1e-4, atol=1e-5)
    assert isinstance(lora_model(model.unload(), factors), peft.PeftModel)
