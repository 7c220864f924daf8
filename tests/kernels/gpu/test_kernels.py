"""The gradient kernel, interpreted, against float64: P = BᵀW, Q = WAᵀ, the Gram matrices; and whole Adam runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from inilora_kernels.kernels.backend import Schedule
from inilora_kernels.kernels.gpu.tiles import BlockTile, padded_rank
from inilora_kernels.kernels.reference import AdamState, adam_step, residual_loss

from .cases import DTYPES, PRODUCT_ERROR, check_products, make, make_wave, small_tiles
from .interpreter import interpreted

sizes = st.integers(1, 70)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(1, 3),
    prefetch=st.booleans(),
    scale=st.sampled_from([1e-4, 0.02, 8.0]),
)
def test_products_of_mixed_shapes_match_float64(
    shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype, parts: int, prefetch: bool, scale: float
) -> None:
    # Ranks need not be equal within a wave, only pad to the same.
    ranks = [max(rank - index, padded_rank(rank) // 2 + 1 if rank > 8 else 1) for index in range(len(shapes))]
    weights, problems = make(shapes, ranks, dtype, scale=scale)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank, prefetch=prefetch), [parts] * len(shapes))
        wave.multiply()
    check_products(wave, weights, problems)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64, 128])
def test_products_at_every_padded_rank(rank: int, dtype: torch.dtype) -> None:
    weights, problems = make([(130, 131), (33, 140)], [rank, rank], dtype)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(rank, 64, 32))
        wave.multiply()
    check_products(wave, weights, problems)


@pytest.mark.parametrize(
    ("rank", "dtype", "loss"),
    [
        (4, torch.float32, "mse"),
        (16, torch.bfloat16, "frobenius"),
        pytest.param(16, torch.float16, "mse", marks=pytest.mark.slow),
        pytest.param(4, torch.bfloat16, "mse", marks=pytest.mark.slow),
        pytest.param(8, torch.float32, "frobenius", marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_follow_the_reference(rank: int, dtype: torch.dtype, loss: str) -> None:
    schedule = Schedule(steps=50, lr=2e-3, step_size=20, gamma=0.9, loss=loss)
    weights, problems = make([(48, 37), (20, 33)], [rank, rank], dtype)
    padded = padded_rank(rank)
    # Few programs, as each costs the interpreter milliseconds; two strips, two parts and two blocks are among them.
    chosen = replace(small_tiles(rank, columns=32), block=BlockTile(32, 2, padded, 4), sum_block=padded**2, sum_width=2)
    with interpreted():
        wave = make_wave(weights, problems, chosen, [1, 2], schedule)
        wave.advance(50)
    for index, (W, problem) in enumerate(zip(weights, problems, strict=True)):
        state = AdamState.start(problem.A.double(), problem.B.double())
        for step in range(50):
            adam_step(W.double(), state, step, schedule)
        A, B = wave.pair(index)
        moved = state.A - problem.A.double()
        # Against the distance moved. Where a gradient is nearly zero Adam's quotient turns on its last digits, so a
        # product error of 2e-5 shows as up to a hundred times that in single entries, and far less in the norm.
        assert float((A.double() - state.A).norm() / moved.norm()) < 50 * PRODUCT_ERROR[dtype]
        assert float((B.double() - state.B).norm() / (state.B - problem.B.double()).norm()) < 50 * PRODUCT_ERROR[dtype]
        found, true = residual_loss(W, A, B), residual_loss(W.double(), state.A, state.B)
        assert math.isclose(found, true, rel_tol=50 * PRODUCT_ERROR[dtype])
