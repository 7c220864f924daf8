"""One run from start to row: the data, the model, transformers' Trainer, the scores."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from . import word_problems
from .benchmarks import evaluate
from .checkpoint import checkpoint, load_checkpoint, save_checkpoint
from .data import Task, load_task, load_tokenizer
from .evaluation import outcomes, score_predictions
from .language import finetune_language
from .rows import Row
from .run import Run
from .systems import prepare


def finetune(run: Run, model: Path, data: Path | None, checkpoints: Path | None = None) -> Row:
    """Train and evaluate; the row has the settings, the scores, and the training loss.

    checkpoints: a folder that keeps what was trained until a benchmark has been run, so that one that fails does not
        cost the training.
    """
    if run.task == word_problems.NAME:
        return finetune_language(run, model)
    begin = time.monotonic()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    task = load_task(run.task, model, data, run.max_length, run.train_size, run.evaluation_size)
    tokenizer = load_tokenizer(model)
    network, found = prepare(run, model, task.labels)
    prepared = time.monotonic()
    file = checkpoint(run, checkpoints) if checkpoints is not None and run.evaluations else None
    if file is not None and file.is_file():
        outcome = load_checkpoint(file, network)
    else:
        outcome = _train(run, task, network, tokenizer)
        if file is not None:
            save_checkpoint(file, network, outcome)
    metrics = outcome["metrics"]
    begun = time.monotonic()
    for name in run.evaluations:
        metrics.setdefault("benchmarks", {}).update(evaluate(name, network, tokenizer, data, run.evaluation_size))
    done = time.monotonic()
    return {
        "run": run.record(),
        "scores": metrics.get("benchmarks") or metrics.get("test") or metrics.get("validation", {}),
        "validation_score": metrics["validation"][task.metrics[0]] if task.metrics else None,
        "metrics": metrics,
        "per_example": outcome["per_example"],
        "training_loss": outcome["training_loss"],
        "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "factors": found,
        "examples": {
            part: len(rows)
            for part, rows in (("train", task.train), ("validation", task.validation), ("test", task.test))
            if rows is not None and (run.test or part != "test")
        },
        "seconds": {
            "prepare": prepared - begin,
            "train": outcome["seconds"]["train"],
            "evaluate": outcome["seconds"]["evaluate"] + done - begun,
        },
        "transformers": transformers.__version__,
    }


def _train(run: Run, task: Task, network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Train the network, and measure it on the task's own parts."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=network,
            args=_arguments(run, len(task.train), folder),
            train_dataset=task.train,
            eval_dataset=task.validation,
            data_collator=DataCollatorWithPadding(tokenizer) if task.labels else DataCollatorForSeq2Seq(tokenizer),
            compute_metrics=lambda prediction: _scores(task, prediction),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = time.monotonic()
        metrics, per_example = _measure(trainer, task, run)
    return {
        "metrics": metrics,
        "per_example": per_example,
        "training_loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": {"train": trained - begin, "evaluate": time.monotonic() - trained},
    }


def _arguments(run: Run, examples: int, folder: str) -> TrainingArguments:
    at_once = run.device_batch_size or run.batch_size
    steps = run.max_steps if run.max_steps > 0 else math.ceil(math.ceil(examples / run.batch_size) * run.epochs)
    # transformers 4, which the adapters' environment has, calls it otherwise.
    sampling: dict[str, Any] = {"train_sampling_strategy": run.sampling}
    if not hasattr(TrainingArguments, "train_sampling_strategy"):
        sampling = {"group_by_length": run.sampling == "group_by_length"}
    return TrainingArguments(
        output_dir=folder,
        learning_rate=run.lr,
        lr_scheduler_type=run.schedule,
        warmup_steps=math.ceil(run.warmup_ratio * steps),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        optim="adamw_torch",
        num_train_epochs=run.epochs,
        max_steps=run.max_steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=run.batch_size // at_once,
        per_device_eval_batch_size=64,
        bf16=run.dtype == "bfloat16",
        fp16=run.dtype == "float16",
        seed=run.seed,
        data_seed=run.seed,
        eval_strategy="epoch" if run.evaluate == "epoch" else "no",
        save_strategy="no",
        logging_steps=max(1, steps // 24),
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **sampling,
    )


def best_epoch(epochs: list[dict[str, float]], score: str) -> dict[str, float]:
    """The epoch of the highest score; a diverged one, NaN, is the lowest there is.

    >>> best_epoch([{"accuracy": float("nan")}, {"accuracy": 0.7}, {"accuracy": 0.6}], "accuracy")
    {'accuracy': 0.7}
    """
    return max(epochs, key=lambda entry: entry[score] if math.isfinite(entry[score]) else -math.inf)


def _measure(trainer: Trainer, task: Task, run: Run) -> tuple[dict[str, dict[str, float]], list[float]]:
    """The task's metrics on its validation part, at the end or in the best epoch, and on its test part.

    Also every test example's outcome, the part's longest first.
    """
    per_example: list[float] = []
    metrics: dict[str, dict[str, float]] = {}
    if task.validation is not None:
        epochs = [entry for entry in trainer.state.log_history if f"eval_{task.metrics[0]}" in entry]
        if run.evaluate != "epoch":
            epochs = [trainer.evaluate()]
        best = best_epoch(epochs, f"eval_{task.metrics[0]}")
        metrics["validation"] = {name: best[f"eval_{name}"] for name in (*task.metrics, "loss")}
    if task.test is not None and run.test:
        predicted = trainer.predict(task.test)
        metrics["test"] = {name: predicted.metrics[f"test_{name}"] for name in (*task.metrics, "loss")}
        per_example = outcomes(np.asarray(predicted.label_ids), np.asarray(predicted.predictions))
    return metrics, per_example


def _scores(task: Task, prediction: EvalPrediction) -> dict[str, float]:
    return score_predictions(task.metrics, np.asarray(prediction.label_ids), np.asarray(prediction.predictions))
