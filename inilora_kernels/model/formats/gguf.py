"""GGUF's weights, of every type that gguf's own code dequantizes (Q8_0, Q4_K, Q6_K and the others).

llama.cpp's converter permutes rows in some architectures (LLaMA's queries and keys); transformers' loader, called here,
moves them back. The result is the matrices of the model that transformers loads from the file.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..files.gguf import GGUFTensor
from .weight import StoredModule, StoredWeight


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    stored = module.tensors.get("weight")
    if not isinstance(stored, GGUFTensor):
        return None

    def dequantize(rows: slice) -> Tensor:
        gguf: Any = importlib.import_module("gguf")
        values = gguf.dequantize(stored.read().numpy(), gguf.GGMLQuantizationType[stored.type]).reshape(stored.values)
        # GPT-2's processor only transposes matrices into Conv1D's orientation.
        if type(stored.processor).__name__ != "GPT2TensorProcessor":
            values = stored.processor.process(weights=values, name=stored.name).weights
        return torch.from_numpy(values[rows]).contiguous()

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=stored.values,
        dtype=torch.float32,
        dequantization=f"gguf {stored.type}",
        stored={"weight": stored},
        dequantize=dequantize,
    )
