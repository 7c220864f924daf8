"""The Krylov solver and its certificate against a full SVD in float64, on spectra that break lesser methods."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inilora_kernels import Factors, approximate
from inilora_kernels.factors import FLOAT32_FLOOR
from inilora_kernels.kernels.streaming import gram_multiplier
from inilora_kernels.solvers import krylov
from inilora_kernels.solvers.krylov import principal
from inilora_kernels.solvers.krylov_space import KrylovSpace
from inilora_kernels.solvers.optimum import optima, rank_for_energy
from inilora_kernels.solvers.triplets import Principal


def with_spectrum(d: int, k: int, spectrum: Callable[[Tensor], Tensor], seed: int = 0) -> Tensor:
    """A float32 matrix whose i-th singular value is spectrum(i), i from 1, to float32's rounding."""
    generator = torch.Generator().manual_seed(seed)
    n = min(d, k)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (d, k))
    return ((U * spectrum(torch.arange(1, n + 1, dtype=torch.float64))) @ V.T).float()


def normal(d: int, k: int) -> Tensor:
    return torch.randn(d, k, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are decomposed through WᵀW; here the search for large ones has to take them."""
    monkeypatch.setattr("inilora_kernels.solvers.krylov.GRAM_SIZE", 0)
    monkeypatch.setattr("inilora_kernels.solvers.krylov.TINY_SIZE", 0)


SPECTRA: dict[str, Tensor] = {
    "decaying slowly": with_spectrum(420, 300, lambda i: i**-0.25),
    "decaying, wide": with_spectrum(300, 420, lambda i: i**-0.5),
    "decaying fast": with_spectrum(300, 300, lambda i: i**-1.5),
    "white noise": normal(400, 400),
    "exact rank 5": normal(300, 5) @ normal(5, 320),
    "exact rank 8": with_spectrum(300, 300, lambda i: (i <= 8).double()),
    "forty equal": with_spectrum(300, 300, lambda i: torch.where(i <= 40, 1.0, 0.1 * i**-0.5)),
    "all equal": torch.eye(300),
    "all zero": torch.zeros(300, 300),
    "one huge": with_spectrum(300, 300, lambda i: torch.where(i == 1, 1e6, i**-0.5)),
    "condition 1e12": with_spectrum(300, 300, lambda i: 10 ** (-12 * i / 300)),
    "condition 1e12 within 30": with_spectrum(300, 300, lambda i: 10.0 ** (-12 * i / 30)),
    "tiny numbers": 1e-20 * with_spectrum(300, 300, lambda i: i**-0.5),
    "large numbers": 1e17 * with_spectrum(300, 300, lambda i: i**-0.5),
    "one row": normal(1, 300),
    "one column": normal(300, 1),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_certificate_holds_against_a_full_svd(name: str) -> None:
    W = SPECTRA[name]
    ranks = [1, 3, 8] if min(W.shape) > 8 else [1]
    found = principal(W, ranks)
    squares = torch.linalg.svdvals(W.double()).square()
    energy = float(squares.sum())
    # Rounding of either float64 decomposition, against the largest square.
    rounding = 1e-14 * energy
    for rank in ranks:
        best, least = float(squares[:rank].sum()), float(squares[rank:].sum())
        captured = float((W.double() @ found.V[:, :rank]).square().sum())
        assert best - captured <= found.shortfalls[rank] + rounding
        assert found.shortfalls[rank] <= max(krylov.TOLERANCE * least, FLOAT32_FLOOR * energy) * (1 + 1e-6)
        product = (found.U[:, :rank] * found.S[:rank]) @ found.V[:, :rank].T
        loss = float((W.double() - product).square().sum())
        # U and S carry the rounding of the float32 products, 2⁻²⁴ of each singular value.
        assert loss - least <= found.shortfalls[rank] + 2.0**-44 * energy
        assert optima(W, [rank])[rank].loss <= least + rounding


@pytest.mark.parametrize("name", SPECTRA)
def test_small_matrices_through_their_gram_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "TINY_SIZE", 512)
    W = SPECTRA[name]
    rank = min(8, *W.shape)
    found = principal(W, [rank])
    squares = torch.linalg.svdvals(W.double()).square()
    energy = float(squares.sum())
    captured = float((W.double() @ found.V).square().sum())
    # As in the next test: what rounding the factors to float32 may cost is 2⁻⁴⁴.
    assert float(squares[:rank].sum()) - captured <= 1e-14 * energy
    assert found.optimum(rank) <= float(squares[rank:].sum()) + 1e-14 * energy
    product = (found.U * found.S) @ found.V.T
    assert float((W.double() - product).square().sum()) <= float(squares[rank:].sum()) + 2.0**-44 * energy


@pytest.mark.parametrize(("d", "k", "rank"), [(1, 1, 1), (30, 30, 30), (70, 64, 12)])
def test_the_gram_matrix_has_the_square_of_the_condition(d: int, k: int, rank: int) -> None:
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = krylov._by_gram(W, [rank], float(W.square().sum()))
    assert found is not None
    true_U, true_S, true_Vh = torch.linalg.svd(W, full_matrices=False)
    half = rank // 2 + 1
    torch.testing.assert_close(found.S[:half], true_S[:half], rtol=1e-12, atol=0.0)
    best = (true_U[:, :rank] * true_S[:rank]) @ true_Vh[:rank]
    assert float(((found.U * found.S) @ found.V.T - best).norm()) <= 1e-10 * float(true_S[0])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("gauge", ["nearest", "svd"])
def test_factors_reach_the_minimum(name: str, gauge: str) -> None:
    W = SPECTRA[name]
    rank = min(8, *W.shape)
    one = approximate(W, rank, solver="krylov", gauge=gauge)
    assert isinstance(one, Factors)
    squares = torch.linalg.svdvals(W.double()).square()
    least, energy = float(squares[rank:].sum()), float(squares.sum())
    loss = float((W.double() - one.B.double() @ one.A.double()).square().sum())
    # 2⁻⁴⁴ of the energy is what rounding the factors to float32 may cost.
    assert loss <= least * (1 + 2e-8) + 2.0**-44 * energy
    assert one.certificate.loss == pytest.approx(loss, rel=1e-9, abs=1e-15 * energy)
    assert one.certificate.optimum <= least + 1e-14 * energy
    A, B = one.A.double(), one.B.double()
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-5 * math.sqrt(energy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    W = with_spectrum(420, 300, lambda i: i**-0.4).to(dtype)
    squares = torch.linalg.svdvals(W.double()).square()
    found = principal(W, [8])
    captured = float((W.double() @ found.V).square().sum())
    assert 0 <= float(squares[:8].sum()) - captured + 1e-13 <= found.shortfalls[8] + 2e-13
    assert found.shortfalls[8] <= 1e-8 * float(squares[8:].sum())


def test_the_same_matrix_gives_the_same_bits() -> None:
    W = with_spectrum(600, 900, lambda i: i**-0.4)
    first, second = principal(W, [8]), principal(W.clone(), [8])
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)
    assert first.shortfalls == second.shortfalls


def test_ranks_share_the_passes() -> None:
    W = with_spectrum(600, 500, lambda i: i**-0.6)
    together = principal(W, [4, 8, 16])
    assert together.vectors < sum(principal(W, [rank]).vectors for rank in (4, 8, 16))


@pytest.mark.parametrize("shape", [(300, 420), (1500, 1600)])
def test_the_same_bits_for_any_number_of_threads(shape: tuple[int, int]) -> None:
    """f* of an Adam run differed in its last digits between one core and two."""
    W = normal(*shape) * torch.arange(1, shape[1] + 1) ** -0.5
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            one = approximate(W, 8, solver="krylov", cache=False)
            best = optima(W, [8])[8]
            found.append((one.A, one.B, one.certificate, best))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


def test_leading_singular_values_are_those_of_a_full_svd() -> None:
    W = with_spectrum(600, 500, lambda i: i**-0.6)
    leading = torch.tensor(principal(W, [8]).leading, dtype=torch.float64)
    assert len(leading) >= 8
    torch.testing.assert_close(leading, torch.linalg.svdvals(W.double())[: len(leading)], rtol=1e-2, atol=0.0)


def test_the_bound_on_what_was_missed_holds_for_every_number_of_passes() -> None:
    for seed in range(20):
        W = with_spectrum(200, 200, lambda i: i**-0.1, seed)
        largest = float(torch.linalg.matrix_norm(W.double(), ord=2)) ** 2
        start = torch.randn(4, 200, generator=torch.Generator().manual_seed(seed + 100))
        space = KrylovSpace(gram_multiplier(W, torch.float32, threads=1), start, torch.Generator().manual_seed(0))
        for _ in range(12):
            space.expand()
            bound, found = space.bound_outside()
            assert found == pytest.approx(float(torch.linalg.eigvalsh(space.T)[-1]), rel=1e-12)
            # Of products in float32.
            assert found <= largest * (1 + 1e-5)
            assert largest <= bound * (1 + 1e-5)


def test_without_a_certificate_small_matrices_are_solved_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[Tensor] = []

    def dense(W: Tensor, ranks: list[int]) -> Principal:
        solved.append(W)
        return original(W, ranks)

    original = krylov.dense
    monkeypatch.setattr(krylov, "dense", dense)
    principal(torch.eye(300), [8])
    assert len(solved) == 1


@pytest.mark.parametrize("size", [300, 700])
def test_rank_for_energy_is_the_smallest_that_keeps_the_share(size: int) -> None:
    W = with_spectrum(size, size, lambda i: i**-0.5)
    squares = torch.linalg.svdvals(W.double()).square()
    kept = squares.cumsum(0) / squares.sum()
    for share in (1e-6, 0.3, 0.5):
        rank = rank_for_energy(W, share)
        assert kept[rank - 1] >= share
        assert rank == 1 or kept[rank - 2] < share
    assert rank_for_energy(torch.zeros(4, 4), 0.5) == 1


def test_nearest_is_nearer_than_svd_and_start_draws_it_near() -> None:
    W = with_spectrum(300, 300, lambda i: i**-0.3) * 0.05
    short = approximate(W, 8, steps=300, lr=5e-3)
    assert isinstance(short, Factors)
    by_default, near, svd = (
        approximate(W, 8, solver="krylov"),
        approximate(W, 8, solver="krylov", start=short),
        approximate(W, 8, solver="krylov", gauge="svd"),
    )
    assert isinstance(by_default, Factors)
    assert isinstance(near, Factors)
    assert isinstance(svd, Factors)

    def distance(one: Factors) -> float:
        return float((one.A - short.A).square().sum() + (one.B - short.B).square().sum())

    assert distance(near) < distance(by_default)
    assert distance(near) < distance(svd)
    torch.testing.assert_close(near.product(), svd.product(), rtol=1e-4, atol=1e-6)


def test_torch_has_its_threads_back_after_a_large_matrix() -> None:
    threads = torch.get_num_threads()
    W = normal(1500, 1500)
    W[0] *= 100
    principal(W, [1])
    assert torch.get_num_threads() == threads
