"""What follows a small matrix's triplets in compiled calls, against float64 and LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inilora_kernels import gauge
from inilora_kernels.initializations import pissa
from inilora_kernels.kernels.cpu import few_rows
from inilora_kernels.kernels.dense import few
from inilora_kernels.solvers.krylov import principal
from inilora_kernels.solvers.optimum import loss_near

# (r, d, k)
SHAPES = [(1, 5, 7), (2, 9, 9), (8, 384, 384), (16, 512, 300), (8, 20, 4000)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("r", "d", "k"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_gauge_is_procrustes(r: int, d: int, k: int, seed: int) -> None:
    A, B = draw(r, k, seed=seed), draw(r, d, seed=seed + 10).T
    A_start, B_start = draw(r, k, seed=seed + 20), draw(d, r, seed=seed + 30)
    M = (B.double().T @ B_start.double() + A.double() @ A_start.double().T).numpy()
    X, _, Yh = np.linalg.svd(M)
    G = torch.from_numpy(X @ Yh)
    A_near, B_near = gauge.nearest(A, B, A_start, B_start)
    # Float32's rounding of the result, and float64's in G, which M's condition (below 1e4 here) magnifies.
    for found, wanted in ((A_near, G.T @ A.double()), (B_near, B.double() @ G)):
        assert found.dtype == torch.float32
        assert float((found.double() - wanted).abs().max()) <= 2.0**-24 * float(wanted.abs().max()) + 1e-11


def test_the_compiled_call_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", None)
    gauge.nearest(draw(8, 384), draw(8, 384).T, draw(8, 384, seed=1), draw(384, 8, seed=2))


@pytest.mark.parametrize("r", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("spread", [0, 4, 9])
def test_rotations_find_singular_vectors(r: int, spread: int) -> None:
    """Also of a matrix whose singular values span nine powers of ten."""
    random = np.random.default_rng(r)
    left, right = (np.linalg.qr(random.standard_normal((r, r)))[0] for _ in range(2))
    sigma = 10.0 ** -np.linspace(0, spread, r)
    M = left * sigma @ right
    X, Y, found = few_rows._orthogonal(M)
    assert found
    unit = 2.0**-52
    assert np.abs(X @ X.T - np.eye(r)).max() < 30 * r * unit * 10.0**spread
    assert np.abs(Y @ Y.T - np.eye(r)).max() < 30 * r * unit
    lengths = np.linalg.norm(M @ Y.T, axis=0)
    assert np.abs((X.T * lengths) @ Y - M).max() < 30 * r * unit


@pytest.mark.parametrize("r", [2, 8])
def test_a_start_that_decides_nothing_takes_lapacks_gauge(r: int) -> None:
    """As LoRA's own start has B = 0 and few rows of A may be dependent: M is singular, and G any of many."""
    A, B = draw(r, 40), draw(r, 30, seed=1).T
    A_start, B_start = draw(r, 40, seed=2), torch.zeros(30, r)
    A_start[1] = A_start[0]
    A_near, B_near = gauge.nearest(A, B, A_start, B_start)
    assert torch.allclose(B_near @ A_near, B @ A, atol=1e-4)
    before = float((B - B_start).square().sum() + (A - A_start).square().sum())
    after = float((B_near - B_start).square().sum() + (A_near - A_start).square().sum())
    assert after <= before * (1 + 1e-6)


def test_zeros_and_the_smallest_numbers() -> None:
    zeros = torch.zeros(2, 5)
    near = gauge.nearest(zeros, zeros.T, zeros, zeros.T)
    assert all(float(one.abs().max()) == 0.0 for one in near)
    tiny = 1e-30 * draw(2, 5)
    A_near, _ = gauge.nearest(tiny, tiny.T.contiguous(), tiny, tiny.T.contiguous())
    assert torch.allclose(A_near, tiny, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("r", "d", "k"), SHAPES)
def test_balanced_factors(r: int, d: int, k: int) -> None:
    U, V, S = draw(r, d).double(), draw(r, k, seed=1).double(), draw(r, seed=2).double().abs()
    A, B = pissa(U.T, S, V.T)
    root = S.sqrt()
    # One rounding to float32.
    assert float((A.double() - root[:, None] * V).abs().max()) <= 2.0**-24 * float((root[:, None] * V).abs().max())
    assert float((B.double() - U.T * root).abs().max()) <= 2.0**-24 * float((U.T * root).abs().max())


@pytest.mark.parametrize(("d", "k", "rank"), [(384, 384, 8), (320, 700, 4), (310, 310, 16)])
def test_the_loss_is_that_of_the_residual(d: int, k: int, rank: int) -> None:
    W = draw(d, k) / 20
    found = principal(W, [rank])
    A, B = pissa(found.U, found.S, found.V)
    assert few(A, B.T, found.U.T, found.V.T)
    loss = loss_near(found, rank, A, B)
    assert loss is not None
    exact = float((W.double() - B.double() @ A.double()).square().sum())
    # What `loss_near` leaves out.
    assert abs(loss - exact) < 1e-11 * float(W.double().square().sum())


def test_factors_that_are_not_the_triplets_are_read_off_W() -> None:
    W = draw(384, 384)
    found = principal(W, [8])
    A, B = pissa(found.U, found.S, found.V)
    assert loss_near(found, 8, 1.001 * A, B) is None


def test_what_is_few() -> None:
    rows = draw(8, 384)
    assert few(rows, rows.double())
    assert not few(draw(17, 20)), "the rotations of many rows take longer than LAPACK's calls"
    assert not few(draw(16, 4096)), "torch's products are faster than its calls"
    assert not few(rows.bfloat16())
