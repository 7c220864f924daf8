"""Files of tensors of every dtype, and what every reader must give back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint


def assert_holds(path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        entry = checkpoint.tensors[name]
        assert entry.dtype == tensor.dtype
        assert entry.shape == tuple(tensor.shape)
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.sha256(name) == stored_sha256(tensor)


def stored_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()


MIXED = {
    "half.weight": torch.randn(5, 3).half(),
    "brain.weight": torch.randn(4, 4).bfloat16(),
    "single.weight": torch.randn(3, 7),
    "double.weight": torch.randn(2, 2, dtype=torch.float64),
    "packed.weight": torch.arange(6, dtype=torch.uint8).reshape(3, 2),
    "counts": torch.arange(4),
    "fp8.weight": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "cube": torch.randn(2, 3, 4),
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


TENSORS = {f"layers.{layer}.{name}.weight": torch.randn(6, 4) for layer in (0, 1) for name in ("q_proj", "v_proj")}


def holds(path: Path, prefix: str = "") -> bool:
    checkpoint = open_checkpoint(path)
    return all(torch.equal(checkpoint.read(prefix + name), tensor) for name, tensor in TENSORS.items())
