"""Which tensors factors need, by names alone; test_hub.py has the shards."""

from __future__ import annotations

import pytest

from inilora_kernels.errors import FactorFileError
from inilora_kernels.model.needed import tensors_read

NAMES = ["bert.layer.0.query.weight", "bert.layer.0.query.bias", "bert.layer.1.query.weight", "classifier.weight"]


def test_every_stored_part_of_the_weights_that_have_factors() -> None:
    assert tensors_read(["layer.0.query"], "model")(NAMES, {}) == NAMES[:2]
    assert tensors_read(["layer.0.query"], "model", {"classifier"})(NAMES, {}) == [*NAMES[:2], NAMES[3]]
    packed = ["h.0.qkv.qweight", "h.0.qkv.scales", "h.1.qkv.qweight"]
    assert tensors_read(["h.0.qkv:query", "h.0.qkv:value"], "model")(packed, {}) == packed[:2]
    assert tensors_read(["layer.0.experts.down_proj:1"], "model")(NAMES, {}) == NAMES
    with pytest.raises(FactorFileError, match="the factors are not of this model"):
        tensors_read(["layer.9.query"], "model")(NAMES, {})


def test_a_pipelines_models_that_are_in_shards() -> None:
    names = ["transformer.0.to_q.weight", "transformer.1.to_q.weight"]
    assert tensors_read(["transformer.1.to_q", "text_encoder.0.q_proj"], "model")(names, None) == names[1:]
    assert tensors_read(["text_encoder.0.q_proj"], "model")(names, None) == []
