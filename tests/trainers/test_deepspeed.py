"""DeepSpeed's ZeRO-3 on two gloo processes, by transformers' Trainer and by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from inilora_kernels import FactorSet, approximate_model

from ..model.live_factors import GIVEN, same
from .others import FOLDER, ROOT

# transformers shards the model while it loads it, and DeepSpeed one that is whole when it takes it over. Its own
# operation for shared memory, which it compiles for CPUs, is left out: gloo does the same.
SCRIPT = """
import os, sys, tempfile, warnings
import torch, torch.distributed as dist
warnings.filterwarnings("error", message=".*cannot build")
torch.set_num_threads(1)
import deepspeed
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from inilora_kernels import approximate_model, lora_model
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
folder, out = sys.argv[1:]
given = {"rank": 2, "solver": "krylov", "cache": False, "progress": False}
ids = torch.arange(12).view(2, 6)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}

def factorize(model, name):
    approximate_model(model, **given).save(f"{out}/{name}-{dist.get_rank()}")
    assert all(not one.numel() for one in model.parameters()), "a weight was left whole"
    assert not [one for one in os.listdir(tempfile.gettempdir()) if one.startswith("inilora-")]

def arguments(steps):
    options = {"save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": []}
    options |= {"deepspeed": config, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 1}
    return TrainingArguments(f"{out}/trainer", max_steps=steps, **options)

def trainer(steps):
    model = lora_model(LlamaForCausalLM.from_pretrained(folder), f"{out}/sharded-0")
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(16, 6) % 64]
    return Trainer(model, arguments(steps), train_dataset=rows)

def output(engine, name):
    logits = engine(input_ids=ids).logits.detach()
    if dist.get_rank() == 0:
        torch.save(logits, f"{out}/{name}.pt")

keeps = arguments(2)
factorize(LlamaForCausalLM.from_pretrained(folder), "sharded")
dist.barrier()
first = trainer(2)
first.train()
first.save_model(f"{out}/trained")
output(first.model_wrapped, "trained")
again = trainer(4)
again.train(resume_from_checkpoint=True)
again.save_model(f"{out}/resumed")
output(again.model_wrapped, "resumed")

unset_hf_deepspeed_config()
model = LlamaForCausalLM.from_pretrained(folder)
assert all(one.numel() for one in model.parameters())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
output(engine, "start")
factorize(engine.module, "engine")
engine.backward(engine(input_ids=ids, labels=ids).loss)  # the model is what it was
engine.step()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_that_zero3_shards(llama: Path, tmp_path: Path) -> None:
    """Its factors are the folder's; it trains, resumes, and saves a plain LoRA for the original."""
    if not (FOLDER / "deepspeed").is_dir():
        pytest.skip("make trainers installs deepspeed")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    places = {"TMPDIR": str(tmp_path / "temporary"), "INILORA_CACHE": str(tmp_path / "cache")}
    paths = os.pathsep.join([str(FOLDER / "deepspeed"), str(ROOT)])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py", str(llama), "."]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **places, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = approximate_model(llama, **GIVEN)
    for name in ("sharded-0", "sharded-1", "engine-0", "engine-1"):
        assert same(FactorSet.load(tmp_path / name), expected)
    ids = torch.arange(12).view(2, 6)

    def original() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(llama)

    with torch.no_grad():
        start = original()(input_ids=ids).logits
        assert torch.equal(torch.load(tmp_path / "start.pt"), start)
        for name in ("trained", "resumed"):
            logits = torch.load(tmp_path / f"{name}.pt")
            assert not torch.allclose(logits, start, rtol=0, atol=1e-3)
            loaded = PeftModel.from_pretrained(original(), tmp_path / name)(input_ids=ids).logits
            assert torch.allclose(loaded, logits, rtol=0, atol=1e-5 * float(start.abs().max()))
    assert not torch.equal(torch.load(tmp_path / "trained.pt"), torch.load(tmp_path / "resumed.pt"))
