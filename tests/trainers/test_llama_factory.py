"""LLaMA-Factory itself, with its page's script, YAMLs and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from inilora_kernels import convert, export_delta, export_residual

from ..test_docs import blocks
from .others import adapted, output, prepared, python, run, settings, write

__all__ = ["prepared"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prepared")]
# For reviews and a few steps.
HERE = {
    "dataset_dir": ".",
    "dataset": "reviews",
    "template": "default",
    "save_steps": 2,
    "report_to": "none",
    "learning_rate": 0.01,
}


def test_llama_factory_trains_and_resumes() -> None:
    # It imports torchaudio to read sound, and has none to read here.
    Path("torchaudio.py").touch()
    python("llama_factory.md", "train.py")
    start = output(AutoModelForCausalLM.from_pretrained("model"))
    config = settings("llama_factory.md", **HERE)
    run("llama-factory", "train.py", write("train.yaml", config))
    trained = adapted("trained")
    assert (trained - start).abs().max() > 0.1
    convert("trained", "factors.safetensors", "lora", base="model")
    assert torch.allclose(adapted("lora"), trained, rtol=0, atol=1e-4)
    resumed = {**config, "max_steps": 4, "resume_from_checkpoint": "trained/checkpoint-2"}
    run("llama-factory", "train.py", write("resumed.yaml", resumed))
    assert (adapted("trained") - trained).abs().max() > 0.01


def test_llama_factory_goes_on_from_the_folders() -> None:
    Path("torchaudio.py").touch()
    Path("train.py").write_text("from llamafactory.train.tuner import run_exp\n\nrun_exp()\n", encoding="utf-8")
    export_residual("model", "factors.safetensors", "residual")
    export_delta("model", "factors.safetensors", "delta")
    start = output(AutoModelForCausalLM.from_pretrained("model"))
    pages = [yaml.safe_load(block.text) for block in blocks("llama_factory.md") if block.language == "yaml"]
    first = {}
    for form in ("residual", "delta"):
        folders = next(page for page in pages if page.get("adapter_name_or_path") == f"{form}/adapter")
        here = {**HERE, "logging_steps": 1, "output_dir": f"{form}/trained"}
        config = {**settings("llama_factory.md", **here), **folders}
        for name in ("lora_rank", "lora_alpha", "lora_target"):
            del config[name]
        run("llama-factory", "train.py", write("train.yaml", config))
        base = AutoModelForCausalLM.from_pretrained(folders["model_name_or_path"])
        trained = output(PeftModel.from_pretrained(base, f"{form}/trained"))
        assert (trained - start).abs().max() > 0.1
        convert(f"{form}/trained", "factors.safetensors", f"{form}/lora", base="model")
        assert torch.allclose(adapted(f"{form}/lora"), trained, rtol=0, atol=1e-4)
        state = json.loads(Path(form, "trained/trainer_state.json").read_text(encoding="utf-8"))
        first[form] = next(step["loss"] for step in state["log_history"] if "loss" in step)
    # Both start from the original model; a loss is logged to four digits.
    assert first["residual"] == pytest.approx(first["delta"], rel=0, abs=1e-3)
