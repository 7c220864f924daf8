"""Lightning with the adapter layer: its own checkpoints, resumed, and the way back to the original model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from inilora_kernels import FactorSet, attach, convert, save_adapter, trainable_parameters

from .conftest import BATCH, Logits


class Classifier(lightning.LightningModule):
    def __init__(self, base: Path, factors: FactorSet) -> None:
        super().__init__()
        self.model = attach(AutoModelForSequenceClassification.from_pretrained(base), factors)
        self.model.classifier.requires_grad_(True)
        self.losses: list[float] = []

    def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**rows).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*trainable_parameters(self.model), *self.model.classifier.parameters()], lr=1e-3)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_from_factors_to_a_plain_lora_on_the_original_model(
    classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    untrained = logits(AutoModelForSequenceClassification.from_pretrained(classifier))
    module = Classifier(classifier, minilm_factors)
    assert torch.equal(logits(module.model), untrained)
    module.train()
    batches = DataLoader(dataset, batch_size=BATCH)
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, batches)
    assert sum(module.losses[-4:]) < 0.85 * sum(module.losses[:4])
    trained = logits(module.model)
    assert (trained - untrained).abs().max() > 0.1

    save_adapter(module.model, tmp_path / "trained", classifier, task_type="SEQ_CLS")
    convert(tmp_path / "trained", minilm_factors, tmp_path / "lora")
    original = AutoModelForSequenceClassification.from_pretrained(classifier)
    reloaded = PeftModel.from_pretrained(original, tmp_path / "lora")
    assert torch.allclose(logits(reloaded), trained, rtol=0, atol=1e-4)


def test_a_run_resumed_from_its_checkpoint_ends_where_an_unbroken_one_does(
    classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    def run(name: str, epochs: int, checkpoint: Path | None = None) -> Classifier:
        lightning.seed_everything(0, verbose=False)
        module = Classifier(classifier, minilm_factors)
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # its random numbers are not in Lightning's checkpoint
        batches = DataLoader(dataset.select(range(2 * BATCH)), batch_size=BATCH)
        run = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        run.fit(module.train(), batches, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        return module

    unbroken = run("unbroken", 2)
    run("half", 1)
    resumed = run("resumed", 2, tmp_path / "half.ckpt")
    assert torch.equal(logits(resumed.model), logits(unbroken.model))
