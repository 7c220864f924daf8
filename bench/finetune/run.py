"""One run: every setting that its result depends on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One model, fine-tuned once. Two runs with the same settings have the same result, whatever table asks for them.

    task: the data set trained on; see data.py.
    evaluations: what is measured besides the task's own validation and test parts; see evaluation.py.
    method: an initialization of `approximate_model`, or a comparison system of systems.py.
    solver, steps, init_std: options of `approximate_model`.
    rank: of the factors; for adapters of the bottleneck kind the bottleneck's width.
    form: "residual" or "delta", how the factors are attached; dtype: of the base model.
    factors_seed: of the factors' random start; None: the run's own seed. The authors compute IniLoRA's factors once a
        model.
    attention: transformers' implementation of it; None: its choice.
    first_layer: of a language model: the first layer that gets factors.
    lr, seed: of the training; the seed also decides the factors' random start, the head's and the order of the data.
    train_size, evaluation_size: examples taken of each part, the first ones; None: all.
    epochs, max_steps: how long; max_steps=-1: the epochs decide.
    batch_size: examples an optimizer step; device_batch_size of them at once, the rest by accumulation (None: all).
    max_length: tokens an example; longer ones are cut, or left out where the data set says so.
    schedule: of the learning rate after the warm-up, "linear" or "cosine"; max_grad_norm: gradients are clipped there;
        0: not at all. sampling: "group_by_length" (batches of similar length) or "random".
    dropout: of the base model; None: as its config says.
    evaluate: "end", or "epoch": the score is then the best epoch's, as in the paper's Table 1.
    test: whether the test part is used; not by runs that only choose a learning rate.
    """

    task: str
    method: str
    lr: float
    seed: int
    rank: int = 8
    evaluations: tuple[str, ...] = ()
    solver: str | None = None
    steps: int = 20_000
    init_std: float | None = None
    factors_seed: int | None = None
    form: str = "residual"
    dtype: str = "float32"
    attention: str | None = None
    first_layer: int = 0
    train_size: int | None = None
    evaluation_size: int | None = None
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 16
    device_batch_size: int | None = None
    max_length: int = 512
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    sampling: str = "group_by_length"
    dropout: float | None = None
    evaluate: str = "end"
    test: bool = True

    def record(self) -> dict[str, Any]:
        """As JSON values.

        >>> Run.from_record(Run("sst2", "lora", 1e-3, 0).record()) == Run("sst2", "lora", 1e-3, 0)
        True
        """
        return {**asdict(self), "evaluations": list(self.evaluations)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        return cls(**{**record, "evaluations": tuple(record["evaluations"])})

    @property
    def key(self) -> str:
        """The same for equal settings."""
        return json.dumps(self.record(), sort_keys=True)
