"""A small LLaMA with an adapter that started from factors."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.choices import Form
from inilora_kernels.factor_set import FactorSet

FORMS: tuple[Form, ...] = ("delta", "residual")
TARGETS = ["q_proj", "v_proj"]


def load(folder: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 11)[None]).logits


def started(folder: Path, factors: FactorSet, form: Form, **options: object) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    return initialize_peft(get_peft_model(load(folder), config).eval(), factors, form=form)


def change(model: nn.Module) -> Tensor:
    """Stands in for training; returns the new output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return logits(model)
