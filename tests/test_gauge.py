"""The rotation that brings factors near to others, against float64, on one thread and on two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inilora_kernels.gauge import nearest


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# The larger one has so many FLOPs that each side has a thread of its own.
@pytest.mark.parametrize(("d", "k", "rank"), [(40, 30, 3), (700, 900, 128)])
def test_the_product_stays_and_no_other_rotation_is_nearer(d: int, k: int, rank: int) -> None:
    A, B, A_start, B_start = drawn(rank, k, 0), drawn(d, rank, 1), drawn(rank, k, 2), drawn(d, rank, 3)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(nearest(A, B, A_start, B_start))
    torch.set_num_threads(threads)
    (A_near, B_near), other = found
    assert torch.equal(A_near, other[0])
    assert torch.equal(B_near, other[1])
    # Entries of r products, each factor rounded to float32 once.
    torch.testing.assert_close(B_near.double() @ A_near.double(), B.double() @ A.double(), rtol=0, atol=2e-6 * rank)

    def distance(A: Tensor, B: Tensor) -> float:
        return float((A - A_start).square().sum() + (B - B_start).square().sum())

    for seed in range(4):
        turn = torch.linalg.qr(drawn(rank, rank, 10 + seed).double())[0]
        small = torch.linalg.matrix_exp(1e-3 * (turn - turn.T))
        for G in (turn, small):
            assert distance((G.T @ A_near.double()), B_near.double() @ G) > distance(A_near.double(), B_near.double())
