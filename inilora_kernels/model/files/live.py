"""Tensors of a live model or a state dict, on any device: read one at a time, gathered if they are sharded."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensor import tensor_sha256


@dataclass(frozen=True, eq=False)
class LiveTensor:
    """A tensor in memory; see `StoredTensor`.

    A shard of FSDP2 (a DTensor) or of ZeRO-3 is gathered when it is read, so every process has to read the same ones.
    """

    name: str
    file: Path
    tensor: Tensor
    offset: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.tensor, "ds_shape", self.tensor.shape))

    def read(self, rows: slice = slice(None)) -> Tensor:
        with _gathered(self.tensor) as whole:
            part = whole[rows] if whole.ndim else whole
            return part.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def sha256(self) -> str:
        return tensor_sha256(self.read())


@contextlib.contextmanager
def _gathered(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "ds_id"):
        deepspeed: Any = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.data
        return
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    yield whole.detach()
