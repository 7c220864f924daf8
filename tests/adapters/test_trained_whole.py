"""Modules trained whole next to a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from inilora_kernels.adapters.convert import export_merged
from inilora_kernels.adapters.export import export_residual

from ..factorized import factorize
from .models import logits, train


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_a_shared_embedding_of_which_one_was_trained(tmp_path: Path, trained: str) -> None:
    """peft 2777: merged, the other one changed too, and the output was off by 3.8."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "b"
    )
    factors = factorize(tmp_path / "b", ("q_proj", "v_proj"), rank=2)
    export_residual(tmp_path / "b", factors, tmp_path / "out")
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out/base"),
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], modules_to_save=[trained]),
    )
    for name, tensor in load_peft_weights(str(tmp_path / "out/adapter")).items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(tensor)
    expected = train(model)
    model.save_pretrained(tmp_path / "trained")
    export_merged(tmp_path / "trained", factors, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-4)
    assert not torch.equal(merged.model.embed_tokens.weight, merged.lm_head.weight)
