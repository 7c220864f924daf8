"""The difference that training made, from A, B and where they started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from inilora_kernels.adapters.started import Started, difference
from inilora_kernels.choices import Form
from inilora_kernels.factor_set import FactorSet

from ..factorized import inilora_alpha
from .started import FORMS, change, load, logits, started


def test_taking_the_difference_first_keeps_half_precision() -> None:
    """In bfloat16 the rounding error follows what training changed, not BA: the reason for `difference`."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    A0, B0 = inilora_alpha(W, 8)
    generator = torch.Generator().manual_seed(1)
    A = A0 + 1e-3 * torch.randn(A0.shape, generator=generator)
    B = B0 + 1e-3 * torch.randn(B0.shape, generator=generator)
    exact = B.double() @ A.double() - B0.double() @ A0.double()

    def error(B: Tensor, A: Tensor) -> float:
        return float((B.bfloat16().double() @ A.bfloat16().double() - exact).norm() / exact.norm())

    stable, cancelling = difference(A, B, A0, B0), (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))
    assert error(*reversed(stable)) < 2**-7
    assert error(*reversed(cancelling)) > 0.3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["lora_", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_after_training_keeps_what_was_learned(
    llama: Path, factors: FactorSet, form: Form, trained: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Trainer's bf16_full_eval casts the model before it is saved: of small updates, nothing was left."""
    model = started(llama, factors, form)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained in name:
                parameter.add_(1e-5 * torch.randn(parameter.shape, generator=generator))
    layer = next(one for one in model.modules() if getattr(one, "started_as", None))
    learned = layer.lora_B["default"], layer.lora_A["default"]
    B, A = (one.weight.detach().double() for one in learned)
    B0, A0 = (one.initial.double() for one in learned)
    model.to(dtype)
    assert bool(logits(model).isfinite().all())
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(llama), tmp_path)
    saved = next(one for one in plain.modules() if hasattr(one, "lora_A") and "default" in one.lora_A)
    found = saved.lora_B["default"].weight.double() @ saved.lora_A["default"].weight.double()
    # What was trained is kept to float32's rounding of A; the other's start is rounded to 16 bits.
    assert float((found - (B @ A - B0 @ A0)).norm() / (B @ A - B0 @ A0).norm()) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_a_cast_before_training_casts_all(llama: Path, factors: FactorSet, form: Form) -> None:
    model = started(llama, factors, form).bfloat16()
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert {one.initial.dtype for one in model.modules() if isinstance(one, Started)} == {torch.bfloat16}
    if form == "delta":
        assert torch.equal(logits(model), logits(load(llama).bfloat16()))


@pytest.mark.parametrize("form", FORMS)
def test_quantizing_the_base_after_the_start_leaves_a_and_b(
    llama: Path, factors: FactorSet, form: Form, tmp_path: Path
) -> None:
    """torchao's quantize_ takes every nn.Linear, and has no difference of quantized A and A0."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = started(llama, factors, form)
    trained = change(model)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert all(type(one.weight.data) is Tensor for one in model.modules() if isinstance(one, Started))
    # int8 weights, one scale a row, through two layers.
    assert float((logits(model) - trained).norm()) < 0.05 * float(trained.norm())
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(llama), tmp_path)
    assert torch.allclose(logits(plain), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_dict_in_16_bits_is_that_of_the_same_start(llama: Path, factors: FactorSet, form, dtype) -> None:
    """Below 6e-5 float16's numbers are equally far apart, so their rounding is no share of them."""
    small = torch.logspace(-8, -4, 32)
    factors = FactorSet(
        {name: replace(one, A=one.A.index_fill(0, torch.tensor([3]), 0)) for name, one in factors.items()}, {}
    )
    for one in factors.values():
        one.A[3] = small
    model = started(llama, factors, form)
    trained = change(model)
    again = started(llama, factors, form)
    again.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    assert torch.allclose(logits(again), trained, rtol=0, atol=0.05)
