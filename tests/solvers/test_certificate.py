"""No f* above the true one, and no certified excess below it: random and adversarial spectra against float64's SVD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.factors import FLOAT32_FLOOR
from inilora_kernels.kernels.cpu.judgement import shortfall
from inilora_kernels.kernels.cpu.outside import least_outside
from inilora_kernels.solvers.certificate import expected_factor, least_part
from inilora_kernels.solvers.krylov import TOLERANCE, principal
from inilora_kernels.solvers.optimum import optima
from inilora_kernels.solvers.triplets import ROUNDING_SHARE, Principal


@pytest.fixture(autouse=True)
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are decomposed through WᵀW; here the search for large ones has to take them."""
    monkeypatch.setattr("inilora_kernels.solvers.krylov.GRAM_SIZE", 0)
    monkeypatch.setattr("inilora_kernels.solvers.krylov.TINY_SIZE", 0)


@contextmanager
def step_by_step(wanted: bool) -> Iterator[None]:
    """Also what is small is searched as a large W is."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr("inilora_kernels.solvers.krylov_search._in_one_call", lambda *arguments: (True, None))
        yield


# Spectra σ_i, i from 1, of n values; r is the requested rank, and e an exponent drawn between 0 and 1.
SPECTRA = {
    "decaying": lambda i, n, r, e: i ** -(0.05 + 1.5 * e),
    "flat": lambda i, n, r, e: 1 - 1e-3 * e * i / n,
    "all equal": lambda i, n, r, e: torch.ones_like(i),
    "true rank below r": lambda i, n, r, e: (i <= max(1, r // 2)).double(),
    "true rank above r": lambda i, n, r, e: (i <= r + 3).double(),
    "low rank and noise": lambda i, n, r, e: torch.where(i <= r, 1.0, 10 ** (-12 + 9 * e)),
    "low rank below r and noise": lambda i, n, r, e: torch.where(i <= max(1, r // 3), 1.0, 10 ** (-12 + 9 * e)),
    "leading nearly equal": lambda i, n, r, e: torch.where(i <= r + 2, 1 - i * 10 ** (-12 + 6 * e), 0.3 * i**-0.5),
    "tie across r": lambda i, n, r, e: i**-0.5 + (i == r + 1) * (r**-0.5 - (r + 1) ** -0.5) * (1 - 10 ** (-12 + 6 * e)),
    "cluster across r": lambda i, n, r, e: torch.where(i < r - 1, 2.0, torch.where(i <= r + 4, 1.0, 0.1 * i**-0.5)),
    "one huge": lambda i, n, r, e: torch.where(i == 1, 10 ** (8 * e), i**-0.5),
    "ill conditioned": lambda i, n, r, e: 10 ** (-12 * i / n),
    "ill conditioned within r": lambda i, n, r, e: 10 ** (-12 * i / (2 * r)),
}


@st.composite
def matrices(draw: st.DrawFn, least: int = 90, most: int = 230, longer: int = 120) -> tuple[Tensor, int, str]:
    n, more = draw(st.integers(least, most)), draw(st.integers(0, longer))
    rank = draw(st.sampled_from([1, 2, 4, 8, 12, 20]))
    name = draw(st.sampled_from(sorted(SPECTRA)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scale = draw(st.sampled_from([1.0, 1.0, 0.02, 1e-30, 1e30] if dtype == torch.float32 else [1.0, 0.02]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (n + more, n))
    sigma = SPECTRA[name](torch.arange(1, n + 1, dtype=torch.float64), n, rank, draw(st.floats(0, 1)))
    W = (((U * sigma) @ V.T) * scale).clamp(-6e4, 6e4) if dtype == torch.float16 else ((U * sigma) @ V.T) * scale
    W = W.to(dtype)
    return (W.T.contiguous() if draw(st.booleans()) else W), rank, f"{name}, {dtype}, {tuple(W.shape)}, rank {rank}"


def require_honest(W: Tensor, rank: int, found: Principal, what: str) -> None:
    squares = torch.linalg.svdvals(W.double()).square()
    energy = float(squares.sum())
    best, least = float(squares[:rank].sum()), float(squares[rank:].sum())
    # Of the judge itself: two float64 decompositions agree to so much of the energy.
    judge = 2e-14 * energy
    captured = float((W.double() @ found.V[:, :rank]).square().sum())
    assert found.optimum(rank) <= least + judge, what
    assert best - captured <= found.shortfalls[rank] + judge, what
    if found.certified[rank]:
        allowed = max(TOLERANCE * least, FLOAT32_FLOOR * energy)
        assert least - found.optimum(rank) <= allowed + 2 * ROUNDING_SHARE * energy + judge, what
        assert best - captured <= allowed + judge, what


@given(matrices(), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_certificate_is_never_wrong(case: tuple[Tensor, int, str], stepwise: bool) -> None:
    W, rank, what = case
    with step_by_step(stepwise):
        require_honest(W, rank, principal(W, [rank]), what)
    squares = torch.linalg.svdvals(W.double()).square()
    assert optima(W, [rank])[rank].loss <= float(squares[rank:].sum()) + 2e-14 * float(squares.sum()), what


@pytest.mark.slow
@given(matrices(), st.booleans())
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_certificate_is_never_wrong_on_four_thousand(case: tuple[Tensor, int, str], stepwise: bool) -> None:
    W, rank, what = case
    with step_by_step(stepwise):
        require_honest(W, rank, principal(W, [rank]), what)


@pytest.mark.slow
@given(matrices(least=350, most=1100, longer=400), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_certificate_is_never_wrong_on_larger_ones(case: tuple[Tensor, int, str], stepwise: bool) -> None:
    W, rank, what = case
    with step_by_step(stepwise):
        require_honest(W, rank, principal(W, [rank]), what)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-3])
def test_low_rank_matrices_with_both_sides_above_1024(noise: float) -> None:
    """kohya-ss/sd-scripts #2001: a LoRA's product, or the difference of two models, lost up to half of its energy."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(1536, 4, generator=generator) @ torch.randn(4, 1280, generator=generator)
    W += noise * torch.randn(1536, 1280, generator=generator)
    for rank in (4, 16):
        found = principal(W, [rank])
        require_honest(W, rank, found, f"noise {noise}, rank {rank}")
        assert found.certified[rank]


def test_no_matrix_can_be_chosen_against_a_fixed_seed() -> None:
    """A σ_1 whose vector is orthogonal to the first space's start: the block drawn from W's own hash meets it."""
    n, generator = 400, torch.Generator().manual_seed(0)
    start = torch.randn(4, n, generator=generator).double()
    hidden = torch.linalg.svd(start, full_matrices=True).Vh[-1]
    others = torch.linalg.qr(torch.cat([hidden[:, None], torch.randn(n, n - 1, dtype=torch.float64)], 1)).Q[:, 1:]
    sigma = torch.arange(1, n, dtype=torch.float64) ** -0.5
    U = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    W = U @ torch.cat([(1.5 * hidden)[None], sigma[:, None] * others.T])
    found = principal(W, [4])
    require_honest(W, 4, found, "hidden direction")
    assert float(found.S[0]) == pytest.approx(1.5)


@pytest.mark.parametrize("seed", [17, 38, 172, 240])
def test_little_more_than_one_direction(seed: int) -> None:
    """What float32's projections lose of σ_1² was taken for 4e-14 of ||W||² and is up to 3e-13 here."""
    n, generator = 94, torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (2 * n, n))
    W = ((U * 10.0 ** (-6 * torch.arange(1, n + 1, dtype=torch.float64))) @ V.T).half()
    require_honest(W, 1, principal(W, [1]), f"float16's smallest numbers, seed {seed}")


def test_what_cannot_be_certified_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inilora_kernels.solvers.krylov.DENSE_SIZE", 0)
    W = torch.eye(700)
    found = principal(W, [8])
    assert not found.certified[8]
    # Any 8 directions are the best here: the bound is loose, and on the safe side.
    assert found.optimum(8) <= 692


def test_bound_outside_holds_for_any_matrix_with_these_parts() -> None:
    """M = [[θ_2, gᵀ], [g, C]] with λ_max(C) = 0.75: its largest eigenvalue is what the bound has to reach."""
    largest = float(torch.linalg.eigvalsh(torch.tensor([[1.0, 0.5], [0.5, 0.75]], dtype=torch.float64))[-1])
    bound = least_outside(np.array([5.0, 1.0]), np.array([[0.0], [0.5]]), 1, 0.75)
    assert largest <= bound <= largest + 1e-3


def test_shortfall_holds_for_a_full_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        theta = torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values + 1
        R = 0.1 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
        C = torch.diag(torch.rand(6, generator=generator, dtype=torch.float64) * 0.8)
        M = torch.cat([torch.cat([torch.diag(theta), R.T], 1), torch.cat([R, C], 1)])
        true = torch.linalg.eigvalsh(M).flip(0)
        for rank in (1, 2, 4):
            missing = float(true[:rank].sum() - theta[:rank].sum())
            parts = torch.diag(theta).numpy(), (R.T @ R).numpy(), theta.numpy()
            assert missing <= shortfall(*parts, rank, float(C.max())) + 1e-12


def test_the_expected_factor_falls_with_every_pass_and_every_column() -> None:
    factors = [expected_factor(4096, block, passes) for block, passes in ((4, 4), (4, 8), (8, 8), (16, 16))]
    assert factors == sorted(factors, reverse=True)
    assert all(math.isfinite(one) and one > 1 for one in factors)


@pytest.mark.parametrize("block", [1, 2, 4, 16])
def test_normal_numbers_are_shorter_than_the_least_part_as_often_as_it_says(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inilora_kernels.solvers.certificate.FAILURE_PROBABILITY", 0.01)
    draws = torch.randn(200_000, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shorter = float((draws.square().sum(1).sqrt() <= least_part(block)).double().mean())
    # The formula leaves out e^(−ε²/2) at most, and 200,000 draws scatter by 0.0002.
    assert 0.01 * math.exp(-(least_part(block) ** 2) / 2) - 0.001 < shorter < 0.011
