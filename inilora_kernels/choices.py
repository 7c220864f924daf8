"""What a caller chooses by name. Without torch, since `--help` lists these names and need not wait for it."""

from __future__ import annotations

from typing import Literal, get_args

# How an adapter starts without changing the model: see adapters/layer.py.
Form = Literal["delta", "residual"]
FORMS: tuple[str, ...] = get_args(Form)

# PEFT's task_type.
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)
