"""Fixtures that the tests of several modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize


@pytest.fixture(scope="module")
def sharded(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in bfloat16, in shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModel.from_pretrained(minilm).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def factors(llama: Path) -> FactorSet:
    return factorize(llama, ("q_proj", "v_proj"), rank=4)
