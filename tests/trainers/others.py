"""Trainers that run with versions of their own (transformers, peft, TRL): Axolotl, LLaMA-Factory and ms-swift.

`make trainers` installs each into a folder of its own; without them their tests are skipped. torch and the rest are
those of the other tests. The model is a small LLaMA with MiniLM's tokenizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.movie_reviews import Review
from inilora_kernels import approximate_model

from ..test_docs import blocks

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("TRAINERS", ROOT / ".trainers"))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1000, 1024).reshape(2, 12)).logits.float()


def adapted(folder: Path | str) -> Tensor:
    return output(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), folder))


def run(trainer: str, *arguments: str, fails: str = "") -> str:
    """What a Python of this trainer says."""
    if not (FOLDER / trainer).is_dir():
        pytest.skip(f"make trainers installs {trainer}")
    paths = [str(FOLDER / trainer), str(ROOT), str(Path.cwd())]
    # LLaMA-Factory wants some packages that a run without pictures and sound never calls to be there, or older ones.
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DISABLE_VERSION_CHECK": "1", "USE_HF": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(fails), done.stderr[-3000:]
    assert fails in done.stderr
    return done.stdout + done.stderr


def settings(page: str, **changes: Any) -> dict[str, Any]:
    """The page's first YAML, for a CPU and a few steps."""
    first = next(block.text for block in blocks(page) if block.language == "yaml")
    return {**yaml.safe_load(first), "max_steps": 2, "use_cpu": True, "bf16": False, **changes}


def write(name: str, values: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(values), encoding="utf-8")
    return name


def python(page: str, name: str) -> None:
    """The page's first Python, under the name that the page gives it."""
    text = next(block.text for block in blocks(page) if block.language == "python")
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def prepared(tmp_path: Path, minilm: Path, reviews: list[Review], monkeypatch: pytest.MonkeyPatch) -> Path:
    """model, factors.safetensors, and reviews in the trainers' formats."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 30_522}
    tokens = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
    config = LlamaConfig(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained("model")
    AutoTokenizer.from_pretrained(minilm, bos_token="[CLS]", eos_token="[SEP]").save_pretrained("model")
    approximate_model("model", rank=8, solver="krylov", progress=False).save("factors.safetensors")
    texts = [review.text for review in reviews[:64]]
    Path("reviews.csv").write_text("\n".join(["text", *(json.dumps(text) for text in texts)]), encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts]
    Path("reviews.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    rows = [{"instruction": "?", "input": "", "output": text} for text in texts]
    Path("reviews.json").write_text(json.dumps(rows), encoding="utf-8")
    Path("dataset_info.json").write_text('{"reviews": {"file_name": "reviews.json"}}', encoding="utf-8")
    pairs = [{"prompt": "?", "chosen": one, "rejected": other} for one, other in pairwise(texts)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return tmp_path
