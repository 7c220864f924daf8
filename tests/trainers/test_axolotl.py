"""Axolotl's plugin in Axolotl itself, on its page's YAML: trained, resumed, merged, DPO, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from inilora_kernels import convert

from .others import adapted, output, prepared, run, settings, write

__all__ = ["prepared"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prepared")]


def test_axolotl_trains_resumes_and_merges() -> None:
    start = output(AutoModelForCausalLM.from_pretrained("model"))
    config = settings("axolotl.md", learning_rate=0.01)
    run("axolotl", "-m", "axolotl.cli.train", write("train.yaml", config))
    trained = adapted("trained")
    assert (trained - start).abs().max() > 0.1
    convert("trained", "factors.safetensors", "lora", base="model")
    assert torch.allclose(adapted("lora"), trained, rtol=0, atol=1e-4)

    for method in ("memory_efficient", "legacy"):
        write("merge.yaml", {**config, "merge_method": method})
        run("axolotl", "-m", "axolotl.cli.merge_lora", "merge.yaml", "--lora-model-dir=trained")
        merged = output(AutoModelForCausalLM.from_pretrained("trained/merged"))
        # The merged weights are written in bfloat16, whose unit roundoff is 2⁻⁹; two layers of 32 features.
        assert torch.allclose(merged, trained, rtol=0, atol=0.02), method

    resumed = {**config, "max_steps": 4, "resume_from_checkpoint": "trained/checkpoint-2"}
    run("axolotl", "-m", "axolotl.cli.train", write("resumed.yaml", resumed))
    assert (adapted("trained") - trained).abs().max() > 0.01


def test_axolotls_dpo_starts_at_its_reference() -> None:
    fields = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    data = {"path": "pairs.jsonl", "ds_type": "json", "split": "train", "type": fields}
    config = settings("axolotl.md", rl="dpo", datasets=[data], logging_steps=1, max_steps=1)
    said = run("axolotl", "-m", "axolotl.cli.train", write("train.yaml", config))
    assert re.search(r"'loss': '?0\.6931", said)
    assert json.loads(Path("trained/adapter_config.json").read_text(encoding="utf-8"))["r"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel: these kernels read A and B alone"),
        ({"lora_model_dir": "other"}, "lora_model_dir: other and inilora_factors"),
        ({"relora": True, "jagged_restart_steps": 2}, "relora: its restarts"),
        ({"adapter": None, "lora_r": None}, "set adapter: lora or qlora"),
        ({"inilora_factors": "none.safetensors"}, "no such factor file"),
        ({"inilora_form": "delat"}, "inilora_form"),
        ({"lora_r": 4}, "the LoraConfig sets rank 4, the factors"),
    ],
)
def test_axolotls_plugin_refuses(changes: dict[str, Any], message: str) -> None:
    run("axolotl", "-m", "axolotl.cli.train", write("train.yaml", settings("axolotl.md", **changes)), fails=message)
