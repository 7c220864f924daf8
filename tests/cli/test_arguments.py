"""The flags that are made from options.py: one for each field, with its default, and values read from their text."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from inilora_kernels.cli.approximate import approximate
from inilora_kernels.cli.arguments import options_from, target_modules_from
from inilora_kernels.errors import OptionError
from inilora_kernels.options import ModelOptions


def given(**typed: Any) -> dict[str, Any]:
    """The options of a command line that names these flags and no others."""
    flags = inspect.signature(approximate).parameters
    names = [one.name for one in fields(ModelOptions) if "meaning" in one.metadata]
    return options_from({name: flags[name].default for name in names} | typed)


def test_a_flag_that_is_not_given_is_the_functions_own_default() -> None:
    """But for two that are a plain yes here, where a function may be called on a tensor or in a notebook."""
    defaults, typed = ModelOptions(), ModelOptions(**given())
    differ = [one.name for one in fields(ModelOptions) if getattr(defaults, one.name) != getattr(typed, one.name)]
    assert differ == ["cache", "progress"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"rank": "16"}, {"rank": 16}),
        ({"rank": "8,16"}, {"rank": [8, 16]}),
        ({"rank": "energy:0.2"}, {"rank": "energy:0.2"}),
        ({"rank_pattern": ["value=4", r"layer\.0=q=2"]}, {"rank_pattern": {"value": 4, r"layer\.0=q": 2}}),
        ({"init_std": "0.02"}, {"init_std": 0.02}),
        ({"init_std": "global"}, {"init_std": "global"}),
        ({"checkpoint_steps": [5, 10]}, {"checkpoint_steps": (5, 10)}),
    ],
)
def test_values_are_read_from_their_text(typed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: given(**typed)[name] for name in expected} == expected


@pytest.mark.parametrize("pattern", ["value", "=4", "value=four", "value="])
def test_a_rank_pattern_without_a_rank_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="give PATTERN=RANK"):
        given(rank_pattern=[pattern])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (None, None),
        ([], None),
        (["query"], ["query"]),
        (["query,value"], ["query", "value"]),
        (["query", "value"], ["query", "value"]),
        (["all-linear"], "all-linear"),
        ([r".*\.(query|value)"], r".*\.(query|value)"),
    ],
)
def test_names_and_expressions_are_told_apart(typed: list[str] | None, expected: object) -> None:
    assert target_modules_from(typed) == expected
