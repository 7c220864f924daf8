"""Every initialization on real files, by the public functions, against its own formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inilora_kernels import Factors, FactorSet, approximate, approximate_model, approximate_ranks
from inilora_kernels.errors import OptionError, WeightError
from inilora_kernels.initializations import METHODS

SHAPE = (300, 200)
RANK = 8


def one(method: str, **options: object) -> Factors:
    W = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
    result = approximate(W, RANK, method=method, **options)  # type: ignore[call-overload]
    assert isinstance(result, Factors)
    return result


@pytest.mark.parametrize(
    ("method", "options", "A_std", "B_std"),
    [
        ("inilora-alpha", {}, 0.5, 0.5),
        ("inilora-alpha", {"init_std": 1e-4}, 1e-4, 1e-4),
        ("inilora-beta-normal", {}, (2 / 200) ** 0.5, (2 / 8) ** 0.5),
        ("inilora-beta-uniform", {}, (2 / 200) ** 0.5, (2 / 8) ** 0.5),
        ("normal", {}, 0.01, 0.01),
        ("uniform", {}, 0.1 / 3**0.5, 0.1 / 3**0.5),
        ("xavier-normal", {}, (2 / 208) ** 0.5, (2 / 308) ** 0.5),
        ("xavier-uniform", {}, (2 / 208) ** 0.5, (2 / 308) ** 0.5),
        ("lora", {}, 1 / 600**0.5, 0.0),
        ("inilora", {"steps": 0}, 0.05, 0.05),
    ],
)
def test_random_starts_have_their_deviation(
    method: str, options: dict[str, object], A_std: float, B_std: float
) -> None:
    factors = one(method, **options)
    for entries, expected in ((factors.A, A_std), (factors.B, B_std)):
        # Five standard errors of a deviation estimated from n normal entries, σ/√(2n).
        assert abs(float(entries.std()) - expected) <= 5 * expected / (2 * entries.numel()) ** 0.5
        assert abs(float(entries.mean())) <= 5 * expected / entries.numel() ** 0.5


def test_uniform_starts_stay_within_their_bounds() -> None:
    for method, A_bound, B_bound in (
        ("inilora-beta-uniform", (6 / 200) ** 0.5, (6 / 8) ** 0.5),
        ("uniform", 0.1, 0.1),
        ("xavier-uniform", (6 / 208) ** 0.5, (6 / 308) ** 0.5),
        ("lora", 1 / 200**0.5, 0.0),
    ):
        factors = one(method)
        assert 0.98 * A_bound <= float(factors.A.abs().max()) <= A_bound
        assert 0.98 * B_bound <= float(factors.B.abs().max()) <= B_bound


def test_orthogonal_sparse_and_constant() -> None:
    factors = one("orthogonal")
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(RANK), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK), rtol=0.0, atol=1e-5)
    factors = one("sparse")
    assert ((factors.B == 0).sum(dim=0) == 150).all()
    assert ((factors.A == 0).sum(dim=0) == RANK // 2).all()
    factors = one("constant")
    assert factors.A.unique().tolist() == factors.B.unique().tolist() == [pytest.approx(0.001)]


@pytest.mark.parametrize("solver", ["krylov", "exact"])
def test_pissa_is_the_principal_part_in_the_svd_gauge(solver: str) -> None:
    W = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
    factors = one("pissa", solver=solver)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    # Two float32 solvers' rounding in the vectors of a noise spectrum, relative to σ_1.
    torch.testing.assert_close(
        factors.product().double(), U[:, :RANK] * S[:RANK] @ Vh[:RANK], rtol=0.0, atol=2e-4 * float(S[0])
    )
    torch.testing.assert_close(factors.A @ factors.A.T, torch.diag(S[:RANK]).float(), rtol=0.0, atol=1e-4)


def test_milora_is_the_minor_part() -> None:
    W = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
    factors = one("milora")
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close(factors.product().double(), U[:, -RANK:] * S[-RANK:] @ Vh[-RANK:], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_certifies_itself_and_repeats(method: str) -> None:
    factors, again = one(method, steps=50), one(method, steps=50)
    assert torch.equal(factors.A, again.A)
    assert torch.equal(factors.B, again.B)
    assert factors.certificate == again.certificate
    W = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
    loss = float((W.double() - factors.B.double() @ factors.A.double()).square().sum())
    assert factors.certificate.loss == pytest.approx(loss, rel=1e-9)
    squares = torch.linalg.svdvals(W.double()).square()
    assert factors.certificate.optimum == pytest.approx(float(squares[RANK:].sum()), rel=2e-8)
    assert factors.certificate.excess > -1e-12
    assert len(factors.singular_values) >= RANK


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 41) ** -0.7
    tensors = {
        f"layer.{layer}.{name}_proj.weight": torch.randn(rows, 40, generator=generator) * decay
        for layer in range(2)
        for name, rows in (("q", 48), ("v", 24))
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


def test_several_ranks_give_a_set_each_that_is_cached_and_saved(model: Path, tmp_path: Path) -> None:
    sets = approximate_ranks(model, [2, 4], solver="krylov", progress=False)
    again = approximate_ranks(model, [2, 4], solver="krylov", progress=False, cache=False)
    assert list(sets) == [2, 4]
    for rank, factors in sets.items():
        assert {one.rank for one in factors.values()} == {rank}
        assert factors.options["rank"] == rank
        assert factors.to_bytes() == again[rank].to_bytes()
        factors.save(tmp_path / "factors.safetensors")
        loaded = FactorSet.load(tmp_path / "factors.safetensors")
        name = next(iter(loaded))
        assert loaded[name].singular_values == factors[name].singular_values
    alone = approximate_model(model, 2, solver="krylov", progress=False)
    for name, factors in alone.items():
        torch.testing.assert_close(sets[2][name].product(), factors.product(), rtol=1e-4, atol=1e-5)


def test_several_ranks_by_adam_are_those_of_single_runs(model: Path) -> None:
    sets = approximate_ranks(model, [2, 3], steps=200, progress=False)
    alone = approximate_model(model, 3, steps=200, progress=False)
    for name, factors in alone.items():
        assert torch.equal(sets[3][name].A, factors.A)


def test_rank_pattern_and_energy(model: Path) -> None:
    factors = approximate_model(
        model, "energy:0.8", rank_pattern={"v_proj": 3, r"layer\.0\.q_proj": 5}, solver="krylov", progress=False
    )
    assert factors["layer.0.v_proj"].rank == factors["layer.1.v_proj"].rank == 3
    assert factors["layer.0.q_proj"].rank == 5
    free = factors["layer.1.q_proj"]
    assert free.certificate.kept >= 0.8 - 1e-9
    squares = torch.linalg.svdvals(load_file(model)["layer.1.q_proj.weight"].double()).square()
    assert float(squares[: free.rank - 1].sum() / squares.sum()) < 0.8


def test_the_same_bytes_whatever_the_batch(model: Path) -> None:
    first = approximate_model(model, 4, solver="krylov", cache=False, progress=False).to_bytes()
    assert approximate_model(model, 4, solver="krylov", cache=False, progress=False, concurrency=1).to_bytes() == first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": "energy:1.5"}, OptionError, "energy:1.5"),
        ({"rank": "much"}, OptionError, "much"),
        ({"rank": []}, OptionError, "at least one"),
        ({"rank": [2, 2]}, OptionError, "different"),
        ({"rank": 100}, WeightError, "rank 100"),
        ({"rank": [2, 4]}, OptionError, "approximate_ranks"),
        ({"rank": [2, 4], "rank_pattern": {"q": 3}}, OptionError, "rank_pattern"),
        ({"rank_pattern": {"q(": 3}}, OptionError, "regular expression"),
        ({"rank_pattern": {"q": 0}}, OptionError, "rank_pattern"),
        ({"method": "lora", "solver": "adam"}, OptionError, "leave solver out"),
        ({"method": "pissa", "solver": "adam"}, OptionError, "krylov, exact"),
        ({"solver": "krylov", "gauge": "round"}, OptionError, "gauge='round'"),
        ({"start": {}}, OptionError, "start"),
        ({"solver": "krylov", "start": {}}, OptionError, "no factors for layer.0.q_proj"),
    ],
)
def test_contradictions_are_refused(
    model: Path, own_cache: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        approximate_model(model, **{"rank": 4, "progress": False, **options})  # type: ignore[call-overload]
    assert not own_cache.exists()
