"""Matrices in memory, read as if they were in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import WeightError
from .files.tensor import blocks_of_rows, has_short_rows, tensor_bytes
from .targets import FLOAT_DTYPES, Target

# What may be given as a matrix W (d×k); a linear layer stands for its weight.
MatrixLike = Tensor | NDArray[np.floating] | nn.Linear


def target_in_memory(name: str, matrix: MatrixLike) -> Target:
    """A matrix W (d×k) in memory as a target. Raises WeightError for anything but a dense float matrix."""
    W = _tensor(name, matrix)
    if W.ndim != 2 or W.dtype not in FLOAT_DTYPES:
        raise WeightError(f"{name}: {W.dtype} of shape {tuple(W.shape)}; give a float matrix with two dimensions")
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
        # From a device, a few copies take less time than many.
        blocks=partial(_blocks, W) if W.device.type == "cpu" and has_short_rows(tuple(W.shape), W.dtype) else None,
    )


def _tensor(name: str, matrix: MatrixLike) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix
    if isinstance(matrix, nn.Linear):
        return matrix.weight
    if isinstance(matrix, np.ndarray) and matrix.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(matrix))
    what = f"an array of {matrix.dtype}" if isinstance(matrix, np.ndarray) else f"of type {type(matrix).__name__}"
    raise WeightError(f"{name} is {what}; give a float tensor, a float array or a linear layer")


def _on_cpu(W: Tensor) -> Tensor:
    return W.detach().cpu().contiguous()


def _sha256(W: Tensor) -> str:
    """Of W's rows, a few at a time: a copy of a W on a GPU, or of columns, would be as large as W."""
    digest = hashlib.sha256()
    for block in _blocks(W):
        digest.update(tensor_bytes(block))
    return digest.hexdigest()


def _blocks(W: Tensor) -> Iterator[Tensor]:
    for rows in blocks_of_rows((W.shape[0], W.shape[1]), W.dtype):
        yield _on_cpu(W[rows])
