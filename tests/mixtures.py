"""Tiny mixtures of experts, made by transformers: a model of each way to store experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from inilora_kernels import FactorSet, approximate_model

EXPERTS = 3
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}

CONFIGS: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2, head_dim=8
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_COMMON | {"num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(**_COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8),
    "llama4": lambda: Llama4TextConfig(
        **_COMMON, intermediate_size_mlp=48, num_local_experts=EXPERTS, head_dim=8, moe_layers=[0, 1]
    ),
}


def mixture(kind: str) -> Any:
    """A small model with random weights. Experts' parameters are not initialized by themselves everywhere."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(kind: str, folder: Path) -> Path:
    mixture(kind).save_pretrained(folder)
    return folder


def factorized(model: Any, **options: Any) -> FactorSet:
    options = {"rank": 2, "target_modules": ["o_proj"], "target_parameters": PARAMETERS} | options
    return approximate_model(model, solver="krylov", cache=False, progress=False, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(24).view(2, 12)
    return model(input_ids=ids).logits.clone()  # type: ignore[no-any-return]


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.arange(24).view(2, 12)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
