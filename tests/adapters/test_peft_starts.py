"""What users start PeftModels on, by the reports of what went wrong there: exact, or refused and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.adapters.started import Started
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError, TargetError, WeightError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Factors

from ..factorized import factorize
from .architectures import MLLAMA
from .models import NONE, save, small, train
from .started import FORMS, TARGETS, load, logits


class _Packed(nn.Module):
    """A quantized layer as AWQ's: no `weight`, and a class that PEFT wraps in a layer of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", weight)
        self.scales = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight.T  # type: ignore[no-any-return]


def test_a_layer_whose_forward_ignores_variants_starts_exactly() -> None:
    """peft 2745: AWQ's, AQLM's and TransformerEngine's layers add lora_B(lora_A(x)) whatever the adapter is."""
    model, factors = small()
    model[0] = _Packed(model[0].weight.detach())
    x = torch.randn(3, 16)
    expected = model(x)
    config = LoraConfig(r=3, target_modules=["0", "2"])
    config._register_custom_module({_Packed: AwqLoraLinear})
    assert torch.equal(initialize_peft(get_peft_model(model, config), factors)(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_meta_are_made_where_the_base_is(llama: Path, factors: FactorSet, form: Form) -> None:
    """peft 2142: `low_cpu_mem_usage=True` leaves A and B on the meta device, and the output was off by 0.4."""
    config = LoraConfig(r=4, target_modules=TARGETS)
    expected = logits(load(llama))
    model = initialize_peft(get_peft_model(load(llama), config, low_cpu_mem_usage=True), factors, form)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)
    model.add_adapter("ref", model.peft_config["default"], low_cpu_mem_usage=True)
    model.set_adapter("ref")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)
    offloaded = get_peft_model(cpu_offload(load(llama), execution_device="cpu"), config)
    if form == "residual":
        with pytest.raises(WeightError, match="offloaded"):
            initialize_peft(offloaded, factors, form)
        return
    assert torch.equal(logits(initialize_peft(offloaded, factors)), expected)


def test_dropout_in_the_residual_form_is_warned_of(llama: Path, factors: FactorSet) -> None:
    """BA is a part of W there, and dropout drops it; the delta form starts exactly, dropout or not."""
    config = LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5)
    with pytest.warns(UserWarning, match="drops BA, a part of the original weight"):
        initialize_peft(get_peft_model(load(llama), config), factors, "residual")
    model = initialize_peft(get_peft_model(load(llama), config), factors).train()
    assert torch.equal(logits(model), logits(load(llama)))


@pytest.mark.parametrize("form", FORMS)
def test_modules_that_are_bypassed_are_refused(form: Form) -> None:
    """peft 761: MultiheadAttention reads out_proj.weight and never calls out_proj."""
    model = nn.MultiheadAttention(16, 4)
    start = Factors(torch.randn(3, 16), torch.randn(16, 3), NONE, "")
    peft_model = get_peft_model(model, LoraConfig(r=3, target_modules=["out_proj"]))
    with pytest.raises(TargetError, match=r"MultiheadAttention\.forward reads its weight"):
        initialize_peft(peft_model, FactorSet({"out_proj": start}, {}), form)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bias": "all"}, 'bias="none"'),
        ({"bias": "lora_only"}, 'bias="none"'),
        ({"lora_bias": True}, "without it"),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, "embed_tokens"),
        ({"layer_replication": [[1, 2], [0, 1]]}, "layer_replication=.*in a model of its own"),
    ],
)
def test_what_convert_could_not_take_is_refused_at_the_start(
    llama: Path, factors: FactorSet, options: dict[str, Any], match: str
) -> None:
    """peft 436: biases and embeddings were trained, and no LoRA for the original could hold them."""
    model = get_peft_model(load(llama), LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises((OptionError, TargetError), match=match):
        initialize_peft(model, factors)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def partitioned(model: nn.Module, of_adapter: bool) -> nn.Module:
    """As deepspeed's ZeRO-3 leaves parameters outside of a forward pass: of no size, their shape in `ds_shape`."""
    for name, parameter in model.named_parameters():
        if of_adapter or "lora_" not in name:
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)  # type: ignore[attr-defined]
    return model


def test_zero_3_is_refused_before_anything_changes(llama: Path, factors: FactorSet) -> None:
    """lerobot's and others' ZeRO-3 runs: a raw error about broadcasting, after A and B had been overwritten."""
    config = LoraConfig(r=4, target_modules=TARGETS)
    model = partitioned(get_peft_model(load(llama), config), of_adapter=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(WeightError, match=r'offloaded or sharded.*use form="delta"'):
        initialize_peft(model, factors, "residual")  # type: ignore[arg-type]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model = partitioned(get_peft_model(load(llama), config), of_adapter=True)
    with pytest.raises(WeightError, match="A and B are sharded already"):
        initialize_peft(model, factors)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_peft_on_a_submodule(llama: Path, factors: FactorSet, form: Form) -> None:
    """vllm 48019: PEFT on `language_model` alone, with the factors of the whole checkpoint."""
    whole = load(llama)
    expected = logits(whole)
    whole.model = get_peft_model(whole.model, LoraConfig(r=4, target_modules=TARGETS))
    initialize_peft(whole.model, factors, form)
    assert torch.allclose(logits(whole), expected, rtol=0, atol=0 if form == "delta" else 1e-5)


@pytest.fixture(scope="module")
def vision_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its language_model has other names on disk, and its vision tower has layers of the same names and shapes."""
    return save("MllamaForConditionalGeneration", tmp_path_factory.mktemp("vision_language"), **MLLAMA)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapped", ["language_model", "text class"])
def test_a_part_of_the_model_whose_checkpoint_has_factors(
    vision_language: Path, form: Form, wrapped: str, tmp_path: Path
) -> None:
    """vllm 48019, LlamaFactory 10294: started, trained, saved, converted and merged by the factors of the whole."""
    factors = factorize(vision_language, ("q_proj", "v_proj"), rank=2)

    def load_whole(folder: Path = vision_language) -> nn.Module:
        of_text = wrapped == "text class"
        model_class = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
        return model_class.from_pretrained(folder).requires_grad_(False)

    def put(whole: nn.Module, adapt: Callable[[nn.Module], PeftModel]) -> nn.Module:
        if wrapped == "text class":
            return adapt(whole)
        whole.model.language_model = adapt(whole.model.language_model)
        return whole

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    expected = logits(load_whole())
    with pytest.warns(UserWarning, match=r"left out the factors of vision_model\."):
        model = put(load_whole(), lambda part: initialize_peft(get_peft_model(part, config), factors, form))
    assert torch.allclose(logits(model), expected, rtol=0, atol=0 if form == "delta" else 1e-5)
    trained = train(model)
    saved = model if isinstance(model, PeftModel) else model.model.language_model
    saved.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factors, tmp_path / "lora", vision_language)
    for folder in (tmp_path / "trained", tmp_path / "lora"):
        loaded = put(load_whole(), lambda part, folder=folder: PeftModel.from_pretrained(part, folder))
        assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5)
    export_merged(tmp_path / "trained", factors, tmp_path / "merged", vision_language)
    assert torch.allclose(logits(load_whole(tmp_path / "merged")), trained, rtol=0, atol=1e-5)


def test_factors_of_the_other_part_are_refused(vision_language: Path) -> None:
    """The vision model's have the names and shapes of the text model's layers, and belong to other weights."""
    factors = factorize(vision_language, ("transformer.layers.0.self_attn.q_proj",), rank=2)
    part = AutoModelForCausalLM.from_pretrained(vision_language).model
    with pytest.raises(TargetError, match=r"no linear module vision_model"):
        initialize_peft(get_peft_model(part, LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"])), factors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"layers_to_transform": [1]}, {"exclude_modules": ".*layers.0.*"}])
def test_some_of_the_modules_that_have_factors(
    llama: Path, factors: FactorSet, form: Form, options: dict[str, Any]
) -> None:
    """peft 1024: frozen layers were told to "use the factors of this model"."""
    model = get_peft_model(load(llama), LoraConfig(r=4, target_modules=TARGETS, **options))
    assert torch.allclose(
        logits(initialize_peft(model, factors, form)), logits(load(llama)), rtol=0, atol=0 if form == "delta" else 1e-5
    )
    names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, Started)]
    assert names
    assert all(".layers.1." in name for name in names)
