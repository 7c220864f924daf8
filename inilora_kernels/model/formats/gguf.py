"""GGUF's weights, of every type that gguf's own code dequantizes.

The most frequent types (Q8_0, Q4_K, Q6_K) are decoded by kernels of ours, to the bit as gguf does, the others by gguf's
code. llama.cpp's converter permutes rows in some architectures (LLaMA's queries and keys); transformers' loader, called
here, moves them back. The result is the matrices of the model that transformers loads from the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.gguf import GGUFTensor
from .weight import StoredModule, StoredWeight, in_strips


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    stored = module.tensors.get("weight")
    if not isinstance(stored, GGUFTensor):
        return None
    order = _stored_rows(stored) if len(stored.values) == 2 else None

    def dequantize_all(rows: slice) -> Tensor:
        if stored.name.endswith("_exps.weight"):  # one row of bytes for each expert
            experts = _dequantized(stored.read(rows), stored)
            return torch.from_numpy(experts.reshape(-1, *stored.values[1:])).contiguous()
        values = _processed(stored, _dequantized(stored.read(), stored).reshape(stored.values))
        return torch.from_numpy(values[rows]).contiguous()

    def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor]) -> None:
        assert order is not None
        pick = order[own]
        first = int(pick.min())
        raw, pick = read(slice(first, int(pick.max()) + 1)), pick - first
        kernels: Any = importlib.import_module("...kernels.cpu.dequantize_gguf", __package__)
        decode = kernels.decoder(stored.type)
        if decode is not None:
            decode(raw.numpy(), pick, out.numpy())
        else:
            out.copy_(torch.from_numpy(_dequantized(raw, stored)[pick]))

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=stored.values,
        dtype=torch.float32,
        dequantization=f"gguf {stored.type}",
        stored={"weight": stored},
        dequantize=dequantize_all
        if order is None
        else lambda rows: in_strips(rows, stored.values[1], torch.float32, fill, [stored]),
    )


def _dequantized(raw: Tensor, stored: GGUFTensor) -> Any:
    gguf: Any = importlib.import_module("gguf")
    return gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[stored.type])


def _processed(stored: GGUFTensor, values: Any) -> Any:
    # GPT-2's processor only transposes matrices into Conv1D's orientation.
    if type(stored.processor).__name__ == "GPT2TensorProcessor":
        return values
    return stored.processor.process(weights=values, name=stored.name).weights


def _stored_rows(stored: GGUFTensor) -> Any:
    """The stored row of each of a matrix's rows; None where the processor does more than move rows."""
    probe = np.arange(2 * stored.values[0], dtype=np.float32).reshape(-1, 2)
    try:
        moved = _processed(stored, probe)
    except Exception:
        # It needs all columns, or arguments that only transformers' own loader has.
        return None
    rows = moved[:, 0].astype(np.int64) // 2 if np.shape(moved) == probe.shape else np.empty(0, np.int64)
    return rows if len(rows) == len(probe) and np.array_equal(moved, probe[rows]) else None
