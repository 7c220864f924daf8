"""The names that callers choose from, against those of the libraries that they are handed to."""

from __future__ import annotations

from typing import get_args

import peft

from inilora_kernels.choices import Form, TaskType


def test_task_types_are_pefts() -> None:
    assert set(get_args(TaskType)) == {one.value for one in peft.TaskType}


def test_there_are_two_forms() -> None:
    assert get_args(Form) == ("delta", "residual")
