"""Tensors of live models, whole where they are sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from inilora_kernels import approximate_model

from ..live_factors import GIVEN, same


def test_sharded_by_fsdp2(llama: Path, one_process: Any) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(llama)
    folder = approximate_model(llama, **GIVEN)
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
    assert same(approximate_model(model, **GIVEN), folder)
