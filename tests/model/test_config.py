"""config.json: counts and sizes that no model has, and those that transformers' own models have."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.config import require_counts

NAMES = ["num_hidden_layers", "n_layer", "num_key_value_heads", "num_local_experts", "encoder_layers", "hidden_size"]


@pytest.mark.parametrize("value", [-1, "2", "x", 2.0, 2.5, 1e300, 10**10, 10**30, True, math.nan, [2, -1], {"a": "b"}])
@pytest.mark.parametrize("name", NAMES)
def test_a_count_that_no_model_has(tmp_path: Path, name: str, value: Any) -> None:
    for place in (name, f"text_config.{name}"):
        outer, _, inner = place.rpartition(".")
        content = {outer: {inner: value}} if outer else {inner: value}
        with pytest.raises(CheckpointError, match=rf"config\.json: {name} is "):
            require_counts(content, tmp_path / "config.json")


@pytest.mark.parametrize("value", [-1, 0, 1e9])
def test_a_model_of_no_layers_is_refused_when_it_is_opened(llama: Path, tmp_path: Path, value: Any) -> None:
    """transformers builds a model without layers, in which no target is found."""
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "num_hidden_layers": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers is "):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": None, "num_experts": 0, "n_routed_experts": None},
        {"num_attention_heads": [1, 2, 5, 8], "num_hidden_layers": {"vision": 5, "language": 9}},
        {"vision_feature_layer": -2, "attention_layers": ["global"], "head": "x", "moe_layers": "3,4,5"},
        {"vision_config": {"num_hidden_layers": 0, "hidden_size": 0}},
    ],
)
def test_what_real_configs_hold(config: dict[str, Any]) -> None:
    require_counts(config, Path("config.json"))


@pytest.mark.slow
def test_every_default_of_transformers_is_allowed() -> None:
    tried = 0
    for kind in transformers.CONFIG_MAPPING:
        try:
            config = transformers.CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # some need arguments, or packages that are not installed
            continue
        require_counts(json.loads(json.dumps(config, default=str)), Path(kind))
        tried += 1
    assert tried > 300
