"""The step's kernels against the float64 reference."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.kernels.backend import Schedule
from inilora_kernels.kernels.cpu.backend import Run
from inilora_kernels.kernels.cpu.simd import kernel_view
from inilora_kernels.kernels.cpu.step import slot_products
from inilora_kernels.kernels.reference import gradient_products

from .cases import DTYPES, problem

shapes = st.tuples(st.integers(1, 420), st.integers(1, 420))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, rank=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_gradient_products(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """P = BᵀW and Q = WAᵀ for shapes that fill no tile, no panel and no rank group."""
    rank = min(rank, *shape)
    one = problem(*shape, rank, dtype)
    start = Run(one, Schedule(1, 1e-3, 10, 0.9, "mse"))
    A, B = start.A, start.B
    for slot in range(A.products.shape[0]):
        first = slot * start.slot_strips
        last = min(first + start.slot_strips, start.W.tiles.shape[0])
        slot_products(kernel_view(start.W.tiles), A.value, B.value, A.products[slot], B.products, first, last)
    P = A.products.sum(0).transpose(0, 2, 1).reshape(-1, A.value.shape[1])[: shape[1], :rank].T
    Q = B.products[: shape[0], :rank]
    W = one.load().double()
    P_true, Q_true = gradient_products(W, one.A.double(), one.B.double())
    # A dot product of n float32 terms errs by at most n·2⁻²⁴·Σ|terms|; float64 weights are rounded once more.
    P_bound = (shape[0] + 4) * 2.0**-24 * (one.B.double().abs().T @ W.abs()) + 1e-12
    Q_bound = (shape[1] + 4) * 2.0**-24 * (W.abs() @ one.A.double().abs().T) + 1e-12
    assert bool(((torch.from_numpy(P).double() - P_true).abs() <= P_bound).all())
    assert bool(((torch.from_numpy(Q).double() - Q_true).abs() <= Q_bound).all())


def test_zero_padding_stays_zero() -> None:
    one = Run(problem(65, 49, 3), Schedule(20, 1e-2, 10, 0.9, "frobenius"))
    one.advance(20, 0, 1)
    A, B = one.A.value, one.B.value
    A = A.transpose(1, 0, 2).reshape(A.shape[1], -1)
    assert not np.any(A[3:]) and not np.any(A[:, 49:])  # noqa: PT018
    assert not np.any(B[65:]) and not np.any(B[:, 3:])  # noqa: PT018
