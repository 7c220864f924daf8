"""Matrices in memory, read as if they stood in a checkpoint."""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from ..errors import WeightError
from .targets import FLOAT_DTYPES, Target


def target_in_memory(name: str, W: Tensor) -> Target:
    """A matrix W (d×k) in memory as a target. Raises WeightError for what is no dense float matrix."""
    if W.ndim != 2 or W.dtype not in FLOAT_DTYPES:
        raise WeightError(f"{name}: {W.dtype} of shape {tuple(W.shape)}; give a float matrix of two dimensions")
    if W.is_meta or W.layout != torch.strided:
        kind = "on the meta device, without values" if W.is_meta else f"stored as {W.layout}"
        raise WeightError(f"{name} is {kind}; give a dense matrix")
    return Target(
        module=name,
        kind="matrix",
        shape=(W.shape[0], W.shape[1]),
        dtype=W.dtype,
        read=partial(_on_cpu, W),
        sha256=partial(_sha256, W),
    )


def _on_cpu(W: Tensor) -> Tensor:
    return W.detach().cpu().contiguous()


def _sha256(W: Tensor) -> str:
    return hashlib.sha256(_on_cpu(W).view(torch.uint8).numpy().data).hexdigest()
