"""A callback for transformers' Trainer and every trainer that is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.peft import initialize_peft
from ..adapters.peft_layer import StartedLoraConfig
from ..choices import Form
from ..errors import OptionError
from ..factor_set import FactorSet


class StartFromFactors(TrainerCallback):
    """Start the LoRA of a trainer's model from factors as soon as the trainer is built.

    For trainers that make the PeftModel themselves: LLaMA-Factory, ms-swift, TRL's with a `peft_config`. Where the
    script makes the model, `lora_model` is simpler. It acts before the optimizer is made, the model is sharded and a
    checkpoint is loaded, so a run can be resumed as usual.

    factors: a FactorSet, or the path of a factor file, which is read at once.
    form, adapter_name: `initialize_peft`'s.

    Raises, when the trainer is built, OptionError for a model without LoRA and what `initialize_peft` raises; and when
    training begins, OptionError for a model other than the one started, such as `model_init` makes.

    >>> from torch import nn
    >>> from transformers import Trainer, TrainingArguments
    >>> callback = StartFromFactors(FactorSet({}, {}))
    >>> arguments = TrainingArguments("runs", report_to=[], use_cpu=True)
    >>> Trainer(nn.Linear(2, 2), arguments, callbacks=[callback])
    Traceback (most recent call last):
    inilora_kernels.errors.OptionError: this trainer's model is a Linear, not a PeftModel; ask the trainer for a LoRA
    """

    def __init__(self, factors: FactorSet | str | Path, form: Form = "delta", adapter_name: str = "default") -> None:
        self.factors = factors if isinstance(factors, FactorSet) else FactorSet.load(factors)
        self.form: Form = form
        self.adapter_name = adapter_name

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        model = given["model"]
        if not isinstance(model, PeftModel):
            raise OptionError(
                f"this trainer's model is a {type(model).__name__}, not a PeftModel; ask the trainer for a LoRA"
            )
        initialize_peft(model, self.factors, self.form, self.adapter_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        configs = getattr(given["model"], "peft_config", {})
        if not isinstance(configs.get(self.adapter_name), StartedLoraConfig):
            raise OptionError(
                "the trainer has made its model anew since it was started from factors, as model_init does; "
                "return lora_model(model, factors) from model_init, and leave this callback out"
            )
