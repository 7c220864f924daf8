"""The ends of many searches at once: as one matrix's own, NaN included, whatever lies beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.dense import combine
from inilora_kernels.kernels.streaming import gram_product
from inilora_kernels.solvers import krylov_batch
from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.krylov_batch import PRODUCT_UNIT, start_of
from inilora_kernels.solvers.krylov_spaces import UNIT, KrylovSpaces
from inilora_kernels.solvers.last_passes import Promise, proven_together
from inilora_kernels.solvers.ritz import ritz_pairs
from inilora_kernels.solvers.triplets import LastPass, concluded

from .test_krylov import with_spectrum
from .torch_batch import TorchBatch

RANK, VECTORS = 4, 128
WEIGHTS = [with_spectrum(300, 200, lambda i: i**-1.0), with_spectrum(180, 260, lambda i: i**-1.5)]


def grown(weights: list[Tensor]) -> tuple[TorchBatch, KrylovSpaces, list[Promise]]:
    """Spaces of these matrices, and a promise for each whose c' is far above what lies outside."""
    batch = TorchBatch(weights, count=3, length=256)
    spaces = KrylovSpaces(batch, krylov_batch._dense(batch, [start_of(W, 1) for W in weights]), [64, 160])
    while spaces.size < VECTORS:
        spaces.expand()
    T, coupling = spaces.here()
    promises = []
    for index in range(len(weights)):
        goal = Goal(float(batch.energies[index]), (1, RANK), 1e-8, PRODUCT_UNIT, exact=False)
        pairs = ritz_pairs(T[index], spaces.leaving(coupling[index]))
        outside = 0.9 * float(pairs.theta[RANK - 1])
        promises.append(Promise(index, goal, pairs, RANK + 1 + index, VECTORS, outside))
    return batch, spaces, promises


def test_each_end_is_that_of_a_matrix_alone() -> None:
    batch, spaces, promises = grown(WEIGHTS)
    found = proven_together(batch, spaces, promises, RANK)
    for one in promises:
        tall = batch.tall(one.index)
        d, n = tall.shape
        X = combine(spaces.Q[one.index, :VECTORS, :n], one.pairs.vectors(one.kept), threads=1)
        alone = concluded(
            one.goal, one.pairs, one.outside, LastPass(X, *gram_product(tall, X)), passes=9, vectors=VECTORS + one.kept
        )
        together = found[one.index]
        U, V = (together.U, together.V) if (d, n) == WEIGHTS[one.index].shape else (together.V, together.U)
        assert (together.passes, together.vectors) == (9, VECTORS + one.kept)
        # Both spaces' vectors are float32's: the triplets agree within its square, and their vectors within it.
        torch.testing.assert_close(together.S, alone.S, rtol=4 * UNIT**2 + 1e-13, atol=0.0)
        assert float((U * alone.U).sum(0).abs().min()) > 1 - 1e-9
        assert float((V * alone.V).sum(0).abs().min()) > 1 - 1e-9
        assert float((tall.double() @ V - U * together.S).abs().max()) < 1e-13 * float(alone.S[0])
        assert together.shortfalls == pytest.approx(alone.shortfalls, rel=1e-3, abs=1e-15 * together.energy)
        assert U.shape == (d, RANK)
        assert U.device.type == "cpu"


def test_what_is_not_certified_is_left_out_and_spoils_nobody() -> None:
    batch, spaces, (first, second) = grown(WEIGHTS)
    unproven = replace(first, outside=2 * float(first.pairs.theta[0]))
    assert set(proven_together(batch, spaces, [unproven, second], RANK)) == {1}
    spaces._rows[0] = 0.0  # its Ritz vectors are not independent: all NaN
    (index,) = (found := proven_together(batch, spaces, [first, second], RANK))
    assert index == 1
    assert not found[1].V.isnan().any()
    assert proven_together(batch, spaces, [], RANK) == {}
