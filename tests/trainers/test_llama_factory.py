"""LLaMA-Factory itself, with its page's script and YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inilora_kernels import convert

from .others import adapted, output, prepared, python, run, settings, write

__all__ = ["prepared"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prepared")]


def test_llama_factory_trains_and_resumes() -> None:
    # It imports torchaudio to read sound, and has none to read here.
    Path("torchaudio.py").touch()
    python("llama_factory.md", "train.py")
    start = output(AutoModelForCausalLM.from_pretrained("model"))
    data = {"dataset_dir": ".", "dataset": "reviews", "template": "default", "save_steps": 2}
    config = settings("llama_factory.md", **data, report_to="none", learning_rate=0.01)
    run("llama-factory", "train.py", write("train.yaml", config))
    trained = adapted("trained")
    assert (trained - start).abs().max() > 0.1
    convert("trained", "factors.safetensors", "lora", base="model")
    assert torch.allclose(adapted("lora"), trained, rtol=0, atol=1e-4)
    resumed = {**config, "max_steps": 4, "resume_from_checkpoint": "trained/checkpoint-2"}
    run("llama-factory", "train.py", write("resumed.yaml", resumed))
    assert (adapted("trained") - trained).abs().max() > 0.01
