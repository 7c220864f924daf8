from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, GPT2LMHeadModel

from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError, TargetError, WeightError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize

FORMS: tuple[Form, ...] = ("delta", "residual")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModel.from_pretrained(folder).to(dtype).eval()


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).last_hidden_state


def lora(model: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(**{"r": 8, "target_modules": ["query", "value"], **options})).eval()


def train(model: nn.Module, seed: int = 0, lr: float = 1e-3) -> None:
    ids = torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        (model(ids).last_hidden_state - seed).float().square().mean().backward()
        optimizer.step()


def two_ranks(folder: Path) -> FactorSet:
    """Rank 4 for queries, 8 for values, but 2 for the first value."""
    modules = {
        **factorize(folder, ("query",), rank=4),
        **factorize(folder, ("value",), rank=8),
        **factorize(folder, ("layer.0.attention.self.value",), rank=2),
    }
    return FactorSet(modules, {})


CONFIGS = {
    "plain": {},
    "lora_alpha": {"lora_alpha": 32},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", ["svd", "alpha"])
def test_the_delta_form_starts_from_the_base_models_output_to_the_bit(
    minilm: Path,
    minilm_factors: FactorSet,
    minilm_alpha: FactorSet,
    dtype: torch.dtype,
    start: str,
    options: dict[str, Any],
) -> None:
    base = load(minilm, dtype)
    expected = output(base)
    before = copy.deepcopy(base.state_dict())
    model = lora(base, **options)
    initialize_peft(model, {"svd": minilm_factors, "alpha": minilm_alpha}[start])
    assert torch.equal(output(model), expected)
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items()), "the base was changed"


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_residual_form_starts_from_it_to_float32_rounding(
    minilm: Path, minilm_factors: FactorSet, options: dict[str, Any]
) -> None:
    base = load(minilm)
    expected = output(base)
    W = base.encoder.layer[1].attention.self.query.weight.clone()
    model = initialize_peft(lora(base, **options), minilm_factors, form="residual")
    assert (output(model) - expected).abs().max() < 2e-5
    R = model.get_base_model().encoder.layer[1].attention.self.query.base_layer.weight
    torch.testing.assert_close(R, W - minilm_factors["encoder.layer.1.attention.self.query"].product())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_pattern_and_alpha_pattern(minilm: Path, form: Form, use_rslora: bool) -> None:
    base = load(minilm)
    expected = output(base)
    model = lora(
        base,
        use_rslora=use_rslora,
        rank_pattern={"query": 4, r"layer\.0\.attention\.self\.value": 2},
        alpha_pattern={"query": 3, "value": 16},
    )
    initialize_peft(model, two_ranks(minilm), form=form)
    assert torch.allclose(output(model), expected, rtol=0, atol=0 if form == "delta" else 2e-5)
    train(model)
    assert (output(model) - expected).abs().max() > 1e-3


def test_the_factors_own_ranks_as_rank_pattern(minilm: Path) -> None:
    factors = two_ranks(minilm)
    base = load(minilm)
    expected = output(base)
    model = lora(base, rank_pattern={module: one.rank for module, one in factors.items()})
    assert torch.equal(output(initialize_peft(model, factors)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_gpt2s_conv1d_with_a_fused_weight(gpt2: Path, gpt2_factors: FactorSet, form: Form) -> None:
    base = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    ids = torch.arange(20)[None]
    expected = base(ids).logits
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    initialize_peft(model, gpt2_factors, form=form)
    assert torch.allclose(model(ids).logits, expected, rtol=0, atol=0 if form == "delta" else 1e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1.2)
    changed = model(ids).logits
    assert (changed - expected).abs().max() > 1e-2
    assert torch.allclose(model.merge_and_unload()(ids).logits, changed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_train_to_the_same_place_and_merge(minilm: Path, minilm_factors: FactorSet, form: Form) -> None:
    outputs = []
    for each in ("delta", form):
        model = initialize_peft(lora(load(minilm), lora_alpha=16), minilm_factors, form=each)
        train(model)
        outputs.append(output(model))
    # Three steps of Adam at 1e-3 turn rounding in a gradient near 0 into a step of any size up to 1e-3.
    assert torch.allclose(*outputs, rtol=0, atol=5e-3)
    trained = outputs[-1]
    model.merge_adapter()
    assert torch.allclose(output(model), trained, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert torch.allclose(output(model), trained, rtol=0, atol=2e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(output(merged), trained, rtol=0, atol=2e-5)


def test_the_base_is_there_while_the_adapter_is_off_and_after_unload(minilm: Path, minilm_factors: FactorSet) -> None:
    """peft 2184: PiSSA changes the base model silently."""
    base = load(minilm)
    expected = output(base)
    model = initialize_peft(lora(base), minilm_factors)
    train(model)
    assert not torch.equal(output(model), expected)
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    assert torch.equal(output(model.unload()), expected)


def test_switching_between_adapters_on_one_base(
    minilm: Path, minilm_factors: FactorSet, minilm_alpha: FactorSet
) -> None:
    """peft 2270: with PiSSA, an adapter works only on the base that it left behind."""
    base = load(minilm)
    expected = output(base)
    model = initialize_peft(lora(base), minilm_factors)
    train(model, seed=1)
    first = output(model)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    model.add_adapter("second", config)
    model.set_adapter("second")
    initialize_peft(model, minilm_alpha, adapter_name="second")
    assert torch.equal(output(model), expected)
    train(model, seed=2)
    second = output(model)
    model.add_adapter("plain", config)
    for name, wanted in (("default", first), ("second", second), ("plain", expected), ("default", first)):
        model.set_adapter(name)
        assert torch.equal(output(model), wanted), name
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_bitsandbytes(minilm: Path, minilm_alpha: FactorSet, bits: int) -> None:
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModel.from_pretrained(minilm, quantization_config=config, device_map="cpu")
    _works_on_a_quantized_base(base, minilm_alpha)


def test_quantized_by_torchao(minilm: Path, minilm_alpha: FactorSet) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    _works_on_a_quantized_base(AutoModel.from_pretrained(minilm, quantization_config=config), minilm_alpha)


def _works_on_a_quantized_base(base: nn.Module, factors: FactorSet) -> None:
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # In eval mode bitsandbytes packs 4-bit weights for the CPU in a way that it cannot train with.
    base.train()
    expected = output(base)
    model = lora(base).train()
    with pytest.raises(WeightError, match="quantized or sharded"):
        initialize_peft(model, factors, form="residual")
    initialize_peft(model, factors)
    assert torch.equal(output(model), expected)
    train(model)
    assert not torch.equal(output(model), expected)
    with model.disable_adapter():
        assert torch.equal(output(model), expected)


def test_the_delta_form_is_refused_where_fused_kernels_pass_by_peft(minilm: Path, minilm_factors: FactorSet) -> None:
    def apply_lora_qkv(module: nn.Module, x: Tensor) -> Tensor:  # as Unsloth and Axolotl put it there
        raise NotImplementedError

    model = lora(load(minilm))
    attention = model.get_base_model().encoder.layer[0].attention
    for value in (apply_lora_qkv, types.MethodType(apply_lora_qkv, attention)):
        attention.apply_qkv = value
        with pytest.raises(OptionError, match=r'apply_qkv is apply_lora_qkv of .*use form="residual"'):
            initialize_peft(model, minilm_factors)
    initialize_peft(model, minilm_factors, form="residual")


def test_what_does_not_fit_is_refused_and_changes_nothing(minilm: Path, minilm_factors: FactorSet) -> None:
    def refuses(
        error: type[Exception],
        match: str,
        model: nn.Module,
        factors: FactorSet = minilm_factors,
        form: Form = "residual",
        name: str = "default",
    ) -> None:
        expected = output(model)
        with pytest.raises(error, match=match):
            initialize_peft(model, factors, form, name)
        assert torch.equal(output(model), expected)

    refuses(OptionError, "form='both'", lora(load(minilm)), form="both")
    refuses(OptionError, "no adapter 'other' in this model; there is default", lora(load(minilm)), name="other")
    refuses(OptionError, "is no PeftModel; give what get_peft_model returns", load(minilm))
    refuses(OptionError, r"sets rank 4, the factors .* have 8; set r=8", lora(load(minilm), r=4))
    refuses(OptionError, "plain LoRA, not DoRA", lora(load(minilm), use_dora=True))
    refuses(OptionError, "init_lora_weights='pissa' has set up", lora(load(minilm), init_lora_weights="pissa"))
    refuses(TargetError, "key.* have no factors", lora(load(minilm), target_modules=["query", "key", "value"]))
    refuses(
        TargetError,
        "no linear module .*elsewhere, for which",
        lora(load(minilm)),
        FactorSet({"elsewhere": minilm_factors["encoder.layer.0.attention.self.query"]}, {}),
    )
    once = initialize_peft(lora(load(minilm)), minilm_factors, form="residual")
    refuses(OptionError, "is a residual already", once)
