"""A quantized model from file to file: the delta form starts exactly on it, and nothing writes over its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from inilora_kernels import approximate_model, attach
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.adapters.peft import load_delta
from inilora_kernels.errors import InitializationError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.live import open_live

PROMPT = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture(params=[4, 8])
def quantized(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1)).save_pretrained(tmp_path / "m")
    config = BitsAndBytesConfig(
        load_in_4bit=request.param == 4,
        load_in_8bit=request.param == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@torch.no_grad()
def test_delta_starts_exactly_and_residual_is_refused(quantized: Path, tmp_path: Path) -> None:
    factors = approximate_model(quantized, rank=2, solver="krylov", cache=False, progress=False)
    with pytest.raises(InitializationError, match=r"quantized .*R = W − BA would have to be quantized anew"):
        export_residual(quantized, factors, tmp_path / "residual")
    assert not (tmp_path / "residual").exists()
    export_delta(quantized, factors, tmp_path / "delta")

    live: Any = AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")
    before = live(PROMPT).logits.clone()
    assert torch.equal(load_delta(live, tmp_path / "delta")(PROMPT).logits, before)

    live = AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")
    attach(live, factors)
    assert torch.equal(live(PROMPT).logits, before)


@torch.no_grad()
def test_a_model_that_has_run_is_nearly_the_same(quantized: Path) -> None:
    """bitsandbytes packs 4 bits anew for a CPU's products, at the first of them, and rounds the scales to bfloat16."""
    live: Any = AutoModelForCausalLM.from_pretrained(quantized, device_map="cpu")
    live(PROMPT)
    stored, run = open_checkpoint(quantized).weights, open_live(live).weights
    for name, weight in run.items():
        torch.testing.assert_close(weight.read(), stored[name].read(), rtol=2**-7, atol=0)
