"""Models built aside from the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.integrations import deepspeed

from inilora_kernels.model.architecture import describe


class Stage3:
    """An HfDeepSpeedConfig, as far as transformers asks it; DeepSpeed itself: tests/trainers/test_deepspeed.py."""

    def is_zero3(self) -> bool:
        return True


def test_where_transformers_would_shard_every_new_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that trains under ZeRO-3: transformers could not build the model, so its checks were left out."""
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = Stage3()
    deepspeed.set_hf_deepspeed_config(config)
    config_json = json.loads((llama / "config.json").read_text())
    described = describe(config_json, ["layers.0.self_attn.q_proj"], "AutoModel")
    assert described is not None
    assert len(described.layers) == 1
    assert deepspeed.is_deepspeed_zero3_enabled()
