"""sentence-transformers around a PeftModel: saved as it saves any, and loaded by whoever has the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from inilora_kernels import FactorSet, lora_model
from inilora_kernels.choices import Form

from ..adapters.started import FORMS

TEXT = ["The film was a joy.", "It was far too long."]


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapped_model_saves_what_it_computes(
    minilm: Path, minilm_factors: FactorSet, form: Form, tmp_path: Path
) -> None:
    """trl 3196's kind: it saves adapter_model and loads it as a LoRA of the original, without a word from us."""
    model = SentenceTransformer(str(minilm), device="cpu")
    before = torch.from_numpy(model.encode(TEXT))
    model[0].model = lora_model(model[0].model, minilm_factors, form)
    assert torch.allclose(torch.from_numpy(model.encode(TEXT)), before, rtol=0, atol=1e-6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trained = torch.from_numpy(model.encode(TEXT))
    assert not torch.allclose(trained, before, rtol=0, atol=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(torch.from_numpy(loaded.encode(TEXT)), trained, rtol=0, atol=1e-5)
