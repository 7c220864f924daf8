"""PEFT's comparison with a tiny model in place of the 3B, and a stand-in for what `run` touches of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.method_comparison import CONFIG, experiments, write

ROOT = Path(__file__).parents[2]

# As PEFT's: run.py takes get_model from the utils.py next to it, measures the base without the adapter, trains, saves.
UTILS = """
from peft import get_peft_model
from transformers import AutoModelForCausalLM

def get_model(*, model_id, dtype, compile, use_gc, attn_implementation, peft_config, autocast_adapter_dtype):
    base = AutoModelForCausalLM.from_pretrained(model_id)
    return get_peft_model(base, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
"""
RUN = """
import json, sys
import torch
from peft import PeftConfig
from utils import get_model

folder, model_id = sys.argv[1], json.load(open("model.json"))
parameters = json.load(open(f"{folder}/training_params.json"))
config = PeftConfig.from_pretrained(folder)
config.r = 4
model = get_model(model_id=model_id, dtype="float32", compile=False, use_gc=False, attn_implementation=None,
                  peft_config=config, autocast_adapter_dtype=True)
ids = torch.arange(12).reshape(2, 6)
with model.disable_adapter():
    before = model(input_ids=ids).logits
started = model(input_ids=ids, labels=ids)
trained = [p for p in model.parameters() if p.requires_grad]
first = trained[1].detach().clone()
optimizer = torch.optim.AdamW(trained, **parameters["optimizer_kwargs"])
started.loss.backward()
optimizer.step()
after = model(input_ids=ids).logits
model.save_pretrained("saved")
json.dump({"exact": torch.equal(before, started.logits), "zero": bool((first == 0).all()),
           "learned": not torch.equal(before, after), "verbose": sys.argv[2:]}, open("result.json", "w"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = tmp_path / "model"
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(model)
    comparison = tmp_path / "MetaMathQA"
    comparison.mkdir()
    (comparison / "utils.py").write_text(UTILS)
    (comparison / "run.py").write_text(RUN)
    (comparison / "model.json").write_text(json.dumps(str(model)))
    write(comparison)
    return comparison


def test_the_experiments_are_pefts_lora_but_for_start_and_rate(folder: Path) -> None:
    for path, start, rate in experiments():
        config = json.loads((folder / path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (32, 64, True)
        assert CONFIG.target_modules is None
        parameters = json.loads((folder / path / "training_params.json").read_text())
        assert parameters == {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.0}}
        assert (folder / path / "start.json").is_file() == (start is not None)
        # PEFT's run.py wants experiments/METHOD/NAME.
        assert len(path.parts) == 3


def test_a_run_starts_from_the_weights_and_leaves_the_model_as_it_was(folder: Path) -> None:
    experiment = "experiments/inilora-study/llama-3.2-3B-inilora-rank32-lr_0.001"
    # A relative path, as one types it.
    place = os.path.relpath(folder, ROOT)
    command = [sys.executable, "-m", "bench.method_comparison", "run", place, experiment, "-v"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert result == {"exact": True, "zero": False, "learned": True, "verbose": ["-v"]}
    # What is saved is a plain LoRA of twice the rank, which PEFT loads without us.
    assert json.loads((folder / "saved" / "adapter_config.json").read_text())["r"] == 8
