"""Tiny checkpoints of one stored weight, and what every kind of them must satisfy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.formats.weight import StoredWeight


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def read_one(folder: Path, module: str = "q_proj") -> StoredWeight:
    return open_checkpoint(folder).weights[f"{module}.weight" if module else "weight"]


def assert_reads(weight: StoredWeight, expected: Tensor) -> None:
    """The values to the bit, whole and in parts, and what is said of them before they are read."""
    assert weight.refusal == ""
    assert weight.is_quantized
    assert weight.shape == tuple(expected.shape)
    assert weight.dtype == expected.dtype
    values = weight.read()
    assert values.dtype == expected.dtype
    assert values.is_contiguous()
    assert torch.equal(values, expected)
    assert torch.equal(weight.read(slice(3, 10)), expected[3:10])


def assert_hashes_every_part(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> None:
    """Another byte anywhere in the stored tensors is another sha256."""
    original = read_one(write(folder, tensors, config), module).sha256()
    parts = [name for name, tensor in tensors.items() if tensor.numel() and name.startswith(module)]
    for name in parts:
        changed = tensors[name].clone().contiguous()
        changed.reshape(-1).view(torch.uint8)[0] ^= 1
        assert read_one(write(folder, {**tensors, name: changed}, config), module).sha256() != original, name
