"""Spaces that grow in step: what they claim of each matrix, against float64, also where a block brings nothing new."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from inilora_kernels.solvers.krylov_spaces import UNIT, KrylovSpaces
from inilora_kernels.solvers.ritz import ritz_pairs

from .torch_batch import TorchBatch


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(batch: TorchBatch) -> Tensor:
    start = torch.ones(batch.shape)
    for index, n in enumerate(batch.sizes):
        start[index] = 0.0
        start[index, :, :n] = normal(16, n, seed=index)
    return start


CASES = [
    normal(300, 120),
    normal(100, 200),
    normal(150, 5) @ normal(5, 110),  # used up after five vectors
    torch.eye(128),  # every image lies in the space already
    torch.zeros(140, 110),
    1e-6 * normal(200, 90),
    torch.cat([normal(200, 60), torch.zeros(200, 60)], dim=1),
]


def test_each_space_is_orthonormal_and_holds_what_it_says_of_M() -> None:
    batch = TorchBatch(CASES, count=8, length=128)
    spaces = KrylovSpaces(batch, starts(batch), [32, 80])
    for _ in range(4):
        spaces.expand()
    T, coupling = spaces.here()
    for index, n in enumerate(batch.sizes):
        Q = spaces.Q[index, :, :n].double()
        assert not spaces.Q[index, :, n:].any()
        assert float((Q @ Q.T - torch.eye(64)).abs().max()) < 20 * UNIT
        W = batch.tall(index).double()
        M = W.T @ W
        size = float(torch.linalg.matrix_norm(M, 2))
        assert float((Q @ M @ Q.T - T[index]).abs().max()) <= 40 * UNIT * size
        # All that leaves the space does so from its last block, and β has its length.
        leaving = M @ Q.T - Q.T @ T[index]
        assert float(leaving[:, :48].norm()) <= 200 * UNIT * size
        assert abs(float(leaving[:, 48:].norm()) - float(coupling[index].norm())) <= 200 * UNIT * size


def test_ritz_pairs_are_those_of_the_space() -> None:
    batch = TorchBatch(CASES[:1], count=1)
    spaces = KrylovSpaces(batch, starts(batch), [32, 80])
    for _ in range(5):
        spaces.expand()
    T, coupling = spaces.here()
    pairs = ritz_pairs(T[0], spaces.leaving(coupling[0]))
    W, Q = CASES[0].double(), spaces.Q[0, :, :120].double()
    X = pairs.vectors(len(Q)) @ Q
    residuals = X @ W.T @ W - torch.from_numpy(pairs.theta)[:, None] * X
    size = float(pairs.theta[0])
    lengths = torch.from_numpy(pairs.g).norm(dim=1)
    assert torch.allclose(residuals.norm(dim=1), lengths, atol=200 * UNIT * size, rtol=1e-4)
    assert size <= float(torch.linalg.matrix_norm(W, 2)) ** 2 * (1 + 1e-6)


def test_growing_never_waits_for_the_device() -> None:
    """On the meta device, which has shapes and no numbers: whatever asks for a number raises."""
    start = torch.ones(2, 16, 64, device="meta")
    spaces = KrylovSpaces(lambda X: torch.empty_like(X), start, [64])
    for _ in range(3):
        spaces.expand()
    assert spaces.T.shape == (2, 48, 48)


def test_a_pass_works_in_the_same_memory_each_time() -> None:
    """As a graph does, which is replayed without any of the code that was captured."""
    batch = TorchBatch(CASES, count=8, length=128)
    spaces = KrylovSpaces(batch, starts(batch), [32, 80])

    def places() -> dict[str, int]:
        return {name: value.data_ptr() for name, value in vars(spaces).items() if isinstance(value, Tensor)}

    before = places()
    assert len(before) >= 9
    for _ in range(4):
        spaces.expand()
        assert places() == before


def test_spaces_die_with_their_last_user_and_the_batch_with_them() -> None:
    """Where there are no graphs, too: a cycle would hold the batch's weights until the garbage is collected."""
    batch = TorchBatch(CASES[:1], count=1)
    spaces = KrylovSpaces(batch, starts(batch), [32, 80])
    for _ in range(3):
        spaces.expand()
    gone = weakref.ref(spaces)
    gc.disable()
    try:
        del spaces
        assert gone() is None
    finally:
        gc.enable()
