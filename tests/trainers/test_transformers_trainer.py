"""transformers' Trainer with real peft, on real text: trained, converted, and put back on the original model."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from inilora_kernels import (
    FactorSet,
    convert,
    export_delta,
    export_merged,
    export_residual,
    initialize_peft,
    load_delta,
)

from .conftest import BATCH, STEPS, Logits

WAYS = ("live, delta", "live, residual", "disk, delta", "disk, residual")


def start(way: str, base: Path, factors: FactorSet, folder: Path) -> PeftModel:
    """The model that is trained, with a head of its own next to the adapter."""
    if way == "disk, residual":
        export_residual(base, factors, folder, lora_alpha=16, task_type="SEQ_CLS")
        return AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", is_trainable=True)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    if way == "disk, delta":
        export_delta(base, factors, folder, lora_alpha=16, task_type="SEQ_CLS")
        return load_delta(model, folder)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return initialize_peft(get_peft_model(model, config), factors, form="delta" if "delta" in way else "residual")


def trainer(model: nn.Module, dataset: Dataset, folder: Path, steps: int = STEPS, **options: object) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=dataset)


def train(trainer: Trainer, **options: object) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("way", WAYS)
def test_from_factors_to_a_plain_lora_on_the_original_model(
    way: str, classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    before = hashlib.sha256((classifier / "model.safetensors").read_bytes()).digest()
    model = start(way, classifier, minilm_factors, tmp_path / "start")
    untrained = logits(AutoModelForSequenceClassification.from_pretrained(classifier))
    assert torch.allclose(logits(model), untrained, rtol=0, atol=0 if "delta" in way else 2e-5)

    run = trainer(model, dataset, tmp_path / "run", save_strategy="no")
    losses = train(run)
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    trained = logits(model)
    assert (trained - untrained).abs().max() > 0.1
    run.save_model(tmp_path / "trained")

    convert(tmp_path / "trained", minilm_factors, tmp_path / "lora")
    original = AutoModelForSequenceClassification.from_pretrained(classifier)
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora")
    assert torch.allclose(logits(reloaded), trained, rtol=0, atol=1e-4)
    export_merged(tmp_path / "trained", minilm_factors, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), trained, rtol=0, atol=1e-4)
    assert hashlib.sha256((classifier / "model.safetensors").read_bytes()).digest() == before


@pytest.mark.parametrize("way", ["live, delta", "disk, residual"])
def test_a_run_resumed_from_a_checkpoint_ends_where_an_unbroken_one_does(
    way: str, classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    ends = []
    for name, steps in (("unbroken", (6,)), ("broken", (3, 6))):
        for part, until in enumerate(steps):
            # Each part starts from the files alone, as a new process would.
            model = start(way, classifier, minilm_factors, tmp_path / f"start-{name}-{part}")
            run = trainer(model, dataset, tmp_path / name, until, save_steps=3)
            train(run, resume_from_checkpoint=part > 0)
        ends.append(logits(model))
    # A and B alone come back bit for bit; from a plain LoRA of rank 2r A does up to the rounding of A − A0.
    assert torch.allclose(*ends, rtol=0, atol=0 if way == "disk, residual" else 1e-5)
    # A checkpoint is an adapter folder like any other.
    convert(tmp_path / "broken/checkpoint-6", minilm_factors, tmp_path / "lora", base=classifier)
    original = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.allclose(logits(PeftModel.from_pretrained(original, tmp_path / "lora")), ends[0], rtol=0, atol=1e-4)
