"""Many modules that transformers knows, through every command: work in proportion to their number.

Counted in calls, which a busy machine does not change: six times the modules make at most seven times the calls, and
where each is compared with every other, 36.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inilora_kernels.adapters.attach import attach
from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def calls(run: Callable[[], Any]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def calls_of_each(folder: Path, layers: int, ranks: int) -> dict[str, int]:
    """ranks: how many different ranks the modules have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        max_position_embeddings=16,
    )
    base = folder / "model"
    LlamaForCausalLM(config).save_pretrained(base)
    factors = uneven(factorize(base, LINEAR, rank=ranks + 1), ranks)
    model = LlamaForCausalLM.from_pretrained(base)  # this alone takes transformers a little of the square
    counts = {
        "delta": calls(lambda: export_delta(base, factors, folder / "delta")),
        "convert": calls(lambda: convert(folder / "delta/adapter", factors, folder / "converted")),
        "merge": calls(lambda: export_merged(folder / "delta/adapter", factors, folder / "merged")),
        "attach": calls(lambda: attach(model, factors)),
        "residual": calls(lambda: export_residual(base, factors, folder / "residual")),
    }
    assert len(factors) == 7 * layers
    return counts


def uneven(factors: FactorSet, ranks: int) -> FactorSet:
    """The same factors cut to different ranks, one after the other."""
    return FactorSet(
        {
            name: replace(one, A=one.A[: 2 + number % ranks], B=one.B[:, : 2 + number % ranks].contiguous())
            for number, (name, one) in enumerate(factors.items())
        },
        factors.options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 5])
def test_work_in_proportion_to_the_modules(tmp_path: Path, ranks: int) -> None:
    calls_of_each(tmp_path / "first", 1, ranks)  # what is imported and compiled once
    few, many = (calls_of_each(tmp_path / str(layers), layers, ranks) for layers in (20, 120))
    assert {command: many[command] / few[command] for command in few if many[command] > 7 * few[command]} == {}
