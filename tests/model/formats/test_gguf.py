"""GGUF files that gguf's own writer wrote, against the model that transformers loads from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from ..gguf_model import TYPES, model, write


@pytest.mark.parametrize(
    "kind", [TYPES.F16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_K, TYPES.Q6_K], ids=lambda kind: kind.name
)
def test_transformers_loads_the_same(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "model.gguf", model(), kind)
    live = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for checkpoint in (open_checkpoint(path), open_checkpoint(tmp_path)):
        targets = find_targets(checkpoint)
        assert [target.module for target in targets] == [
            f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qv"
        ]
        for target in targets:
            weight = checkpoint.weights[f"{target.module}.weight"]
            expected = live.get_submodule(target.module).weight.detach()
            assert weight.shape == tuple(expected.shape)
            assert torch.equal(weight.read(), expected)
            assert torch.equal(weight.read(slice(2, 9)), expected[2:9])
            assert weight.dequantization == f"gguf {kind.name}"
