"""The callback that starts the LoRA which a trainer makes itself, with transformers' and TRL's trainers."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertLMHeadModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from inilora_kernels import FactorSet
from inilora_kernels.adapters.started import StartedA
from inilora_kernels.choices import Form
from inilora_kernels.errors import FactorFileError, OptionError
from inilora_kernels.trainers.callback import StartFromFactors

from .conftest import Logits


def adapted(base: Path) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)


def trained(trainer: Trainer, **options: object) -> PeftModel:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)
    return trainer.model


def arguments(folder: Path, steps: int = 4) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=steps, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )


def test_a_run_that_it_started_resumes_and_saves_a_plain_lora(
    classifier: Path, minilm_factors: FactorSet, dataset: Dataset, logits: Logits, tmp_path: Path
) -> None:
    minilm_factors.save(tmp_path / "factors.safetensors")
    untrained = logits(AutoModelForSequenceClassification.from_pretrained(classifier))
    ends = []
    for part in (False, True):
        model = adapted(classifier)
        callback = StartFromFactors(tmp_path / "factors.safetensors")
        trainer = Trainer(model, arguments(tmp_path / "run", 4), train_dataset=dataset, callbacks=[callback])
        assert torch.equal(logits(model), untrained)
        # The second run starts over from the checkpoint in the middle of the first.
        resumed = {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")} if part else {}
        ends.append(logits(trained(trainer, **resumed)))
    assert torch.allclose(*ends, rtol=0, atol=1e-5)  # A comes back up to the rounding of A − A0
    assert not torch.allclose(ends[0], untrained, atol=1e-3)
    trainer.save_model(tmp_path / "lora")
    original = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.allclose(logits(PeftModel.from_pretrained(original, tmp_path / "lora")), ends[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_dpo_that_makes_its_own_lora_starts_at_its_reference(
    form: Form, minilm: Path, minilm_factors: FactorSet, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = BertLMHeadModel.from_pretrained(minilm, config=AutoConfig.from_pretrained(minilm, is_decoder=True))
    pairs = {"prompt": ["The film was"] * 4, "chosen": [" a joy."] * 4, "rejected": [" far too long."] * 4}
    trainer = DPOTrainer(
        base,
        args=DPOConfig(tmp_path, max_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(minilm, eos_token="[SEP]"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["query", "value"]),
        callbacks=[StartFromFactors(minilm_factors, form)],
    )
    assert sum(isinstance(module, StartedA) for module in trainer.model.modules()) == 12
    trained(trainer)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_what_it_cannot_start_is_refused(
    classifier: Path, minilm_factors: FactorSet, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(FactorFileError, match="no such factor file"):
        StartFromFactors(tmp_path / "factors.safetensors")
    start = StartFromFactors(minilm_factors)
    with pytest.raises(OptionError, match="a BertForSequenceClassification, not a PeftModel"):
        Trainer(AutoModelForSequenceClassification.from_pretrained(classifier), arguments(tmp_path), callbacks=[start])
    # `train` calls model_init a second time, and nobody starts what that returns.
    made_anew = Trainer(
        args=arguments(tmp_path), model_init=lambda: adapted(classifier), train_dataset=dataset, callbacks=[start]
    )
    with pytest.raises(OptionError, match="return lora_model"):
        trained(made_anew)
