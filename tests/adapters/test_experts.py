"""Experts through PEFT's target_parameters: started exactly, trained, saved, resumed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from inilora_kernels import (
    FactorSet,
    attach,
    initialize_peft,
)
from inilora_kernels.errors import OptionError, TargetError
from inilora_kernels.lora_start import lora_model

from ..mixtures import CONFIGS, EXPERTS, PARAMETERS, factorized, logits, mixture, train


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_start_is_exact_and_what_was_learned_is_saved(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the bit at the start; trained, saved as a plain LoRA, switched off, and merged."""
    model = mixture(kind).to(dtype)
    expected = logits(model)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    started = lora_model(model, factorized(model), lora_alpha=4)
    assert torch.equal(logits(started), expected)
    train(started)
    trained = logits(started)
    assert not torch.equal(trained, expected)
    started.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(mixture(kind).to(dtype), tmp_path)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(plain), trained, rtol=0, atol=tolerance * float(trained.abs().max()))

    with started.disable_adapter():
        assert torch.equal(logits(started), expected)
    merged = started.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=tolerance * float(trained.abs().max()))
    changed = {name for name, one in merged.named_parameters() if not torch.equal(one, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"gate_up_proj", "down_proj", "weight"}


def test_every_expert_starts_from_its_own_matrix() -> None:
    """Broken on purpose, the layout of PEFT's two matrices is seen here: BA of each expert is near that expert's W."""
    model = mixture("mixtral")
    factors = factorized(model, rank=32, target_modules=None, target_parameters=["experts.gate_up_proj"])
    started = lora_model(model, factors)
    layer = started.get_base_model().model.layers[0].mlp.experts
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A, B = lora_A.reshape(EXPERTS, 32, -1), lora_B.reshape(lora_B.shape[0], 32, EXPERTS)
    for number in range(EXPERTS):  # of full rank, so BA is W
        product = B[:, :, number] @ A[number]
        torch.testing.assert_close(product, layer.get_param()[number], rtol=0, atol=1e-5)


def test_resumes_from_what_it_saved(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    factors = factorized(model)
    started = lora_model(model, factors)
    train(started)
    trained = logits(started)
    started.save_pretrained(tmp_path)
    again = lora_model(mixture("qwen3_moe"), factors)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-5)
    train(started)
    train(again)
    torch.testing.assert_close(logits(again), logits(started), rtol=0, atol=0.05)


def test_an_adapter_added_with_its_config_starts_from_the_same() -> None:
    """As TRL's DPO adds its reference."""
    model = mixture("mixtral")
    expected = logits(model)
    started = lora_model(model, factorized(model))
    started.add_adapter("ref", started.peft_config["default"])
    train(started)
    assert not torch.equal(logits(started), expected)
    started.set_adapter("ref")
    assert torch.equal(logits(started), expected)


def test_the_config_may_be_the_users_own() -> None:
    model = mixture("gpt_oss")
    expected = logits(model)
    factors = factorized(model, target_modules=None)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    started = initialize_peft(get_peft_model(model, config), factors)
    assert torch.equal(logits(started), expected)
    assert {name.split(".lora_")[0] for name, one in started.named_parameters() if one.requires_grad} == {
        f"base_model.model.model.layers.{layer}.mlp.experts" for layer in (0, 1)
    }


def test_what_cannot_be_right_is_refused_at_the_start() -> None:
    model = mixture("mixtral")
    factors = factorized(model)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["o_proj"], target_parameters=PARAMETERS)
    with pytest.raises(OptionError, match='use form="delta"'):
        initialize_peft(get_peft_model(model, config), factors, "residual")
    with pytest.raises(OptionError, match="no dropout for experts"):
        lora_model(mixture("mixtral"), factors, lora_dropout=0.1)
    with pytest.raises(TargetError, match=r"experts.*lora_model"):
        attach(mixture("mixtral"), factors)
    some = FactorSet({name: one for name, one in factors.items() if not name.endswith(":1")}, factors.options)
    with pytest.raises(TargetError, match=r"has 3 experts, and there are factors for 2"):
        lora_model(mixture("mixtral"), some)
    uneven = factorized(mixture("mixtral"), rank_pattern={"gate_up_proj:1": 3})
    with pytest.raises(TargetError, match="one rank"):
        lora_model(mixture("mixtral"), uneven)
