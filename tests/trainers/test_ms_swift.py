"""ms-swift itself, with its page's plugin and command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inilora_kernels import convert

from ..test_docs import blocks
from .others import adapted, output, prepared, python, run

__all__ = ["prepared"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prepared")]


def test_ms_swift_trains_and_merges() -> None:
    python("ms_swift.md", "plugin.py")
    Path("sft.py").write_text("import sys\nfrom swift.pipelines import sft_main\nsft_main(sys.argv[1:])\n")
    Path("export.py").write_text("import sys\nfrom swift.pipelines import export_main\nexport_main(sys.argv[1:])\n")
    command = next(
        block.text for block in blocks("ms_swift.md") if block.mark == "not-run-here" and "sft" in block.text
    )
    for_a_cpu = "--max_steps 2 --torch_dtype float32 --report_to none --model_type llama --template dummy"
    here = f"{for_a_cpu} --learning_rate 0.01 --save_steps 2 --split_dataset_ratio 0 --add_version false"
    arguments = [*shlex.split(command)[2:], *here.split()]
    start = output(AutoModelForCausalLM.from_pretrained("model"))
    run("ms-swift", "sft.py", *arguments)
    trained = adapted("trained/checkpoint-2")
    assert (trained - start).abs().max() > 0.1
    convert("trained/checkpoint-2", "factors.safetensors", "lora", base="model")
    assert torch.allclose(adapted("lora"), trained, rtol=0, atol=1e-4)
    merge = "--adapters trained/checkpoint-2 --merge_lora true --torch_dtype float32 --output_dir merged"
    run("ms-swift", "export.py", *merge.split())
    assert torch.allclose(output(AutoModelForCausalLM.from_pretrained("merged")), trained, rtol=0, atol=1e-4)
    again = ["--resume_from_checkpoint", "trained/checkpoint-2", "--output_dir", "again"]
    run("ms-swift", "sft.py", *arguments, *again, fails="sets rank 16, the factors")
