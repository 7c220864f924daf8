"""Factors of the real model, a small random one of another architecture, and real text."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from factorized import factorize, inilora_alpha
from transformers import GPT2Config, GPT2LMHeadModel

from inilora_kernels.checkpoint import Checkpoint, open_checkpoint
from inilora_kernels.factors import FactorSet


@pytest.fixture(scope="session")
def minilm_checkpoint(minilm: Path) -> Checkpoint:
    return open_checkpoint(minilm)


@pytest.fixture(scope="session")
def minilm_factors(minilm: Path) -> FactorSet:
    return factorize(minilm)


@pytest.fixture(scope="session")
def minilm_alpha(minilm: Path) -> FactorSet:
    return factorize(minilm, start=inilora_alpha)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2: Conv1D, fused query, key and value, tied embeddings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_factors(gpt2: Path) -> FactorSet:
    parts = {"query": (0, 24), "value": (48, 72)}
    return factorize(gpt2, ("c_attn",), rank=4, parts=parts, transposed=True)


@pytest.fixture(scope="session")
def paragraphs() -> list[tuple[str, int]]:
    """Real text: paragraphs of Python's language reference, with the number of the topic that each is about."""
    topics = ("specialnames", "compound", "string-methods", "debugger")
    return [
        (" ".join(paragraph.split()), label)
        for label, topic in enumerate(topics)
        for paragraph in pydoc_data.topics.topics[topic].split("\n\n")
        if len(paragraph) > 120
    ]
