"""Batches and checks that the tests of the direct solver's kernel share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.backend import WIDTH
from inilora_kernels.kernels.gpu.gram_batch import GramBatch
from inilora_kernels.kernels.gpu.gram_layout import gram_layout
from inilora_kernels.kernels.gpu.tiles import GramTile

from .cases import CPU

SHAPES = [(70, 45), (33, 100), (64, 64)]
# Three 16-bit parts hold float32's 24 bits, tf32x3 and ieee are float32's own: a few roundings of 2⁻²⁴.
ERROR = 1e-6
SMALL = GramTile(own=16, inner=32, warps=4, stages=1, precision="ieee")


def matrices(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, scale: float = 0.02, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def batch_of(weights: Sequence[Tensor], tile: GramTile = SMALL, cache: float = math.inf) -> GramBatch:
    layout = gram_layout([(W.shape[0], W.shape[1]) for W in weights], weights[0].element_size(), tile, cache)
    batch = GramBatch(layout, weights[0].dtype, CPU)
    for index, W in enumerate(weights):
        batch.stored(index).copy_(W)
    batch.measure()
    return batch


def unit_vectors(batch: GramBatch, seed: int = 0) -> Tensor:
    X = torch.zeros_like(batch.X)
    generator = torch.Generator().manual_seed(seed)
    for index, n in enumerate(batch.sizes):
        rows = torch.randn(WIDTH, n, generator=generator)
        X[index, :, :n] = rows / rows.norm(dim=1, keepdim=True)
    return X


def check(batch: GramBatch, X: Tensor, weights: Sequence[Tensor]) -> None:
    """Against float64. Each term errs on its own, so the scale is the root of the terms' squares."""
    for index, W in enumerate(weights):
        tall = (W if W.shape[0] >= W.shape[1] else W.T).double()
        x = X[index, :, : tall.shape[1]].double()
        Y, Z = batch.Y[index, :, : len(tall)].double(), batch.Z[index, :, : tall.shape[1]].double()
        image = x @ tall.T
        assert float((Y - image).norm()) <= ERROR * float((x.square() @ tall.square().T).sum().sqrt())
        size = float((image.square() @ tall.square()).sum().sqrt()) + float(Y.norm()) * float(tall.norm())
        assert float((Z - image @ tall).norm()) <= ERROR * size
        assert float(batch.energies[index]) == pytest.approx(float(tall.square().sum()), rel=1e-12)
        # Nothing but zeros beyond a matrix's sizes: torch's batched algebra goes over all of it.
        assert not batch.Z[index, :, tall.shape[1] :].any()
        assert not batch.Y[index, :, len(tall) :].any()
