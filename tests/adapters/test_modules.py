"""Which module of a live model each matrix belongs to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from inilora_kernels.adapters.attach import (
    adapters,
    attach,
    detach,
)
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize
from .models import small


def test_names_may_differ_by_a_prefix() -> None:
    model, factors = small()
    wrapped = nn.ModuleDict({"bert": model, "classifier": nn.Linear(8, 2)})
    attach(wrapped, factors)
    assert [name for name, _ in adapters(wrapped)] == ["bert.0", "bert.2"]
    prefixed = FactorSet({f"model.{name}": part for name, part in factors.items()}, {})
    attach(detach(wrapped)["bert"], prefixed)
    assert [name for name, _ in adapters(model)] == ["0", "2"]


def test_modules_that_transformers_has_renamed(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    model = ViTModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 8, 8)
    expected = model(pixels).last_hidden_state
    factors = factorize(tmp_path, rank=2)
    assert len(factors) == 2
    assert torch.equal(attach(model, factors)(pixels).last_hidden_state, expected)
    assert len(list(adapters(model))) == 2
