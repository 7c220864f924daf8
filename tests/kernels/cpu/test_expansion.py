"""Several steps in one compiled call: MQᵀ = QᵀT + Xᵀβ against float64, and the same bits as one step at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inilora_kernels.kernels.cpu.orthonormal import _SHARED_ENTRIES
from inilora_kernels.kernels.streaming import gram_multiplier
from inilora_kernels.solvers.krylov_space import KrylovSpace

# Of products of float32 over some hundred entries, as a share of ||W||².
ERROR = 1e-6


def decaying(d: int, k: int, dtype: torch.dtype) -> Tensor:
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(0))
    return (W * torch.arange(1, k + 1) ** -0.5).to(dtype)


def space(W: Tensor, width: int, threads: int = 1, fixed: Tensor | None = None) -> KrylovSpace:
    start = torch.randn(width, W.shape[1], generator=torch.Generator().manual_seed(1))
    return KrylovSpace(gram_multiplier(W, torch.float32, threads), start, torch.Generator().manual_seed(2), fixed)


def in_float64(W: Tensor) -> KrylovSpace:
    start = torch.randn(4, W.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return KrylovSpace(gram_multiplier(W, torch.float64, 1), start, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 4, 8])
@pytest.mark.parametrize("upright", [True, False])
def test_the_recurrence_holds(dtype: torch.dtype, width: int, upright: bool) -> None:
    W = decaying(411, 301, dtype) if upright else decaying(301, 411, dtype).T
    grown = space(W, width)
    grown.grow(math.inf, passes=6)
    M = W.double().T @ W.double()
    Q, energy = grown.Q.double(), float(W.double().square().sum())
    assert grown.size == 6 * width
    assert grown.passes == 6
    assert float((Q @ Q.T - torch.eye(len(Q))).abs().max()) < 2e-6
    assert float((Q @ M @ Q.T - grown.T).abs().max()) < ERROR * energy
    pairs = grown.ritz()
    X = pairs.vectors(len(Q)) @ Q
    residuals = X @ M - torch.from_numpy(pairs.theta)[:, None] * X
    lengths = torch.from_numpy(pairs.g).norm(dim=1)
    torch.testing.assert_close(residuals.norm(dim=1), lengths, rtol=1e-3, atol=10 * ERROR * energy)


@pytest.mark.parametrize("upright", [True, False])
def test_the_same_bits_one_step_at_a_time_and_on_several_threads(upright: bool) -> None:
    """2,100 by 1,000 has four parts, which threads share; so they do projections from as many rows as grow here."""
    W = decaying(2100, 1000, torch.float32) if upright else decaying(1000, 2100, torch.float32).T
    at_once, stepwise, *shared = (space(W, 4, threads) for threads in (1, 1, 2, 3))
    passes = 2 + _SHARED_ENTRIES // (4 * 1000)
    at_once.grow(math.inf, passes=passes)
    for _ in range(passes):
        stepwise.expand()
    for other in shared:
        other.grow(math.inf, passes=passes)
    for other in (stepwise, *shared):
        assert torch.equal(at_once.Q, other.Q)
        assert torch.equal(at_once.T, other.T)
        assert np.array_equal(at_once.ritz().g, other.ritz().g)


@pytest.mark.parametrize("compiled", [True, False])
def test_ends_where_the_largest_value_is_below_one_number_or_not_below_another(compiled: bool) -> None:
    W = decaying(411, 301, torch.float32)
    if not compiled:
        W = W.double()

    def grown(stops: list[tuple[float, float]]) -> KrylovSpace:
        one = space(W, 4) if compiled else in_float64(W)
        one.grow(math.inf, passes=len(stops), stops=np.array(stops))
        return one

    never = (0.0, math.inf)
    largest = [grown([never] * passes).largest() for passes in range(1, 7)]
    assert largest == sorted(largest)
    assert grown([never] * 6).passes == 6
    above = [(0.0, 1.0001 * largest[2])] * 6
    assert grown(above).passes == 4
    assert grown([*[never] * 4, *above[4:]]).passes == 5
    assert grown([(0.9999 * largest[0], math.inf)] * 6).passes == 6
    assert grown([never, never, (1.0001 * largest[2], math.inf), never]).passes == 3


def test_stays_orthogonal_to_what_is_fixed_and_grows_no_further_than_there_is_room() -> None:
    W = decaying(90, 40, torch.float32)
    first = space(W, 4)
    first.grow(17, passes=100)
    assert first.size == 20
    other = space(W, 4, fixed=first.Q)
    other.grow(math.inf, passes=100)
    assert other.size == 16
    assert float((other.Q @ first.Q.T).abs().max()) < 2e-6


def test_directions_that_run_out_are_replaced() -> None:
    """W of rank 6: the second block has two directions of its own, and all that follow none."""
    W = decaying(200, 6, torch.float32) @ decaying(6, 150, torch.float32)
    grown = space(W, 4)
    grown.grow(math.inf, passes=6)
    Q, M = grown.Q.double(), W.double().T @ W.double()
    assert grown.size == 24
    assert float((Q @ Q.T - torch.eye(24)).abs().max()) < 2e-6
    assert float((Q @ M @ Q.T - grown.T).abs().max()) < ERROR * float(M.trace())
