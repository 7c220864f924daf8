"""The Adam solver: milestones, tolerance, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inilora_kernels import FactorSet, approximate
from inilora_kernels.factors import Factors
from inilora_kernels.kernels.threads import one_torch_thread


def matrix(d: int = 60, k: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def one(W: torch.Tensor, **options: object) -> Factors:
    result = approximate(W, **options)  # type: ignore[arg-type]
    assert isinstance(result, Factors)
    return result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tol_ends_a_matrix_once_its_excess_is_below(backend: str) -> None:
    factors = one(matrix(), rank=4, steps=20_000, lr=5e-3, tol=1e-3, backend=backend)
    assert factors.certificate.excess <= 1e-3
    assert factors.certificate.steps < 20_000
    assert factors.certificate.steps % 100 == 0
    before = [loss for step, loss in factors.history if step < factors.certificate.steps]
    assert min(before) > factors.certificate.optimum * (1 + 1e-3)


def test_certificate_agrees_with_a_full_svd() -> None:
    W = matrix()
    factors = one(W, rank=4, steps=300, lr=5e-3)
    squares = torch.linalg.svdvals(W.double()).square()
    loss = float((W.double() - factors.B.double() @ factors.A.double()).square().sum())
    certificate = factors.certificate
    assert certificate.loss == pytest.approx(loss, rel=1e-12)
    assert certificate.optimum == pytest.approx(float(squares[4:].sum()), rel=1e-12)
    assert certificate.excess == pytest.approx(loss / float(squares[4:].sum()) - 1, rel=1e-9)
    assert certificate.kept == pytest.approx(1 - loss / float(squares.sum()), rel=1e-9)


def test_checkpoints_are_the_factors_of_a_run_that_ends_there() -> None:
    """StepLR does not look ahead, so a run of 150 steps is the beginning of one of 400."""
    W = matrix()
    long = one(W, rank=3, steps=400, checkpoint_steps=(0, 150))
    short = one(W, rank=3, steps=150)
    A, B = long.checkpoints[150]
    assert torch.equal(A, short.A)
    assert torch.equal(B, short.B)
    assert dict(long.history)[150] == short.certificate.loss
    assert set(long.checkpoints) == {0, 150}


@pytest.mark.parametrize("options", [{"steps": 100}, {"steps": 400, "tol": 1e9}])
def test_factors_kept_at_the_last_step_are_written_too(tmp_path: Path, options: dict[str, float]) -> None:
    """A run that ends on a step to keep, by `steps` or by `tol`, ended in a RuntimeError and wrote nothing."""
    factors = one(matrix(), rank=3, checkpoint_steps=(1, 100), cache=True, **options)
    FactorSet({"0.q": factors}, {}).save(tmp_path / "factors.safetensors")
    loaded = FactorSet.load(tmp_path / "factors.safetensors")["0.q"]
    last = loaded.certificate.steps
    assert last in loaded.checkpoints
    assert torch.equal(loaded.checkpoints[last][0], loaded.A)


def test_zero_steps_give_the_gaussian_start() -> None:
    """The paper's Table 7: initialization without optimization."""
    factors = one(matrix(400, 300), rank=8, steps=0, init_std=0.03)
    assert factors.certificate.steps == 0
    # The standard error of a deviation estimated from n entries is σ/√(2n); five of them.
    for entries in (factors.A, factors.B):
        assert abs(float(entries.std()) - 0.03) < 5 * 0.03 / (2 * entries.numel()) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 3), (33, 65)])
def test_any_shape_up_to_full_rank(shape: tuple[int, int]) -> None:
    rank = min(shape)
    # Two threads meet after each step of microseconds: beside other processes, which hold the cores, that takes 15 s.
    with one_torch_thread():
        factors = one(matrix(*shape), rank=rank, steps=6000, lr=5e-3, step_size=500, gamma=0.5)
    # At full rank f* is zero up to float32's floor, so the residual itself is the measure.
    assert factors.certificate.loss <= 1e-6 * factors.certificate.energy
