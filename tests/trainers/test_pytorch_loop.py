"""A plain PyTorch loop with the adapter layer alone, no peft until the result is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from inilora_kernels import FactorSet, attach, convert, detach, export_merged, merge, save_adapter, trainable_parameters
from inilora_kernels.choices import Form

from .conftest import BATCH, Logits


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_from_factors_to_a_plain_lora_on_the_original_model(
    form: Form, classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    untrained = logits(model)
    attach(model, minilm_factors, form=form, scaling=2.0)
    assert torch.allclose(logits(model), untrained, rtol=0, atol=0 if form == "delta" else 2e-5)
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW([*trainable_parameters(model), *model.classifier.parameters()], lr=1e-3)
    losses = []
    model.train()
    for rows in DataLoader(dataset, batch_size=BATCH):
        loss = model(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    trained = logits(model)
    assert (trained - untrained).abs().max() > 0.1

    save_adapter(model, tmp_path / "trained", classifier, task_type="SEQ_CLS")
    convert(tmp_path / "trained", minilm_factors, tmp_path / "lora")
    original = AutoModelForSequenceClassification.from_pretrained(classifier)
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora")
    assert torch.allclose(logits(reloaded), trained, rtol=0, atol=1e-4)
    export_merged(tmp_path / "trained", minilm_factors, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), trained, rtol=0, atol=1e-4)

    merge(model)
    assert torch.allclose(logits(model), trained, rtol=0, atol=1e-4)
    base = detach(model).bert.encoder.state_dict()
    fresh = AutoModelForSequenceClassification.from_pretrained(classifier).bert.encoder.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in base.items())
