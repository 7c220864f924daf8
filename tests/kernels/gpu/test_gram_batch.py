"""What a batch holds, and whom it multiplies."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from inilora_kernels.kernels.gpu.gram_batch import GramBatch
from inilora_kernels.kernels.gpu.gram_layout import BATCH, gram_layout
from inilora_kernels.solvers.krylov_spaces import KrylovSpaces

from .gram_cases import SHAPES, SMALL, batch_of, check, matrices, unit_vectors
from .interpreter import interpreted


def test_a_transposed_or_sliced_weight_is_taken() -> None:
    (base,) = matrices([(40, 60)], torch.bfloat16)
    for W in (base, base.T.contiguous().T, torch.cat([base, base], dim=1)[:, :60]):
        with interpreted():
            batch = batch_of([W])
            X = unit_vectors(batch)
            batch(X)
        check(batch, X, [base])


def test_a_finished_matrix_costs_no_reading() -> None:
    weights = matrices(SHAPES, torch.bfloat16)
    with interpreted():
        batch = batch_of(weights)
        X = unit_vectors(batch)
        batch.keep([1])
        batch.weights[: batch.layout.places[1].W_offset] = math.nan
        batch(X)
        assert not torch.isnan(batch.Z).any()
        assert not batch.Z[0].any()
        assert not batch.Z[2:BATCH].any()
        # And everyone is back where all are kept.
        batch.padded(0).zero_()
        batch.stored(0).copy_(weights[0])
        batch.keep(range(3))
        batch(X)
    check(batch, X, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pass_waits_for_nothing(dtype: torch.dtype) -> None:
    """On the meta device, which has shapes and no numbers: whatever asks for a number raises."""
    layout = gram_layout(SHAPES, dtype.itemsize, SMALL, math.inf)
    batch = GramBatch(layout, dtype, torch.device("meta"))
    launched: list[int] = []
    batch.launch = lambda: launched.append(1)  # type: ignore[method-assign]
    batch.measure()
    spaces = KrylovSpaces(batch, torch.ones(batch.shape, device="meta"), [32, 64])
    for _ in range(3):
        spaces.expand()
    assert launched == [1] * 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        spaces.here()[0].tolist()
