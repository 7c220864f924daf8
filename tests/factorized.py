"""Factors of a checkpoint's matrices, computed here so that adapters are tested by themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Certificate, Factors
from inilora_kernels.model.checkpoint import open_checkpoint

RANK = 8
Start = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def truncated_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = svd(W)
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).float().contiguous(), (U[:, :rank] * root).float().contiguous()


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, and only once for the same matrix: it is most of these tests' time."""
    return _svd(W.float().contiguous().numpy().tobytes(), W.shape)


@functools.cache
def _svd(content: bytes, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    W = torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(shape)
    return torch.linalg.svd(W.double(), full_matrices=False)


def inilora_alpha(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors that know nothing of W, N(0, 0.5²): BA's entries are about 35 times W's."""
    generator = torch.Generator().manual_seed(W.shape[0])
    A = 0.5 * torch.randn(rank, W.shape[1], generator=generator)
    return A, 0.5 * torch.randn(W.shape[0], rank, generator=generator)


def factorize(
    folder: Path,
    endings: tuple[str, ...] = ("query", "value"),
    rank: int = RANK,
    start: Start = truncated_svd,
    parts: dict[str, tuple[int, int]] | None = None,
    transposed: bool = False,
) -> FactorSet:
    """Factors of every matrix of a checkpoint whose name ends so; parts: rows by name, for a fused weight."""
    checkpoint = open_checkpoint(folder)
    modules = {}
    for tensor in checkpoint.tensors:
        name = tensor.removesuffix(".weight")
        if name == tensor or not name.endswith(endings):
            continue
        stored = checkpoint.read(tensor)
        W = (stored.T if transposed else stored).float()
        for part, rows in (parts or {"": None}).items():
            block = W[slice(*rows)] if rows else W
            A, B = start(block, rank)
            modules[f"{name}:{part}" if part else name] = Factors(
                A, B, _certificate(block, A, B), checkpoint.sha256(tensor), rows=rows, transposed=transposed
            )
    return FactorSet(modules, {"method": "svd", "rank": rank})


def _certificate(W: Tensor, A: Tensor, B: Tensor) -> Certificate:
    S, W = svd(W)[1], W.double()
    loss = float((W - B.double() @ A.double()).square().sum())
    return Certificate(loss, float(S[A.shape[0] :].square().sum()), float(W.square().sum()), 0)
