"""The main job on real files: results, cache, resume after a kill, and every input that is refused."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inilora_kernels import Factors, FactorSet, approximate, approximate_model
from inilora_kernels.errors import (
    BackendError,
    CheckpointError,
    InitializationError,
    OptionError,
    TargetError,
    WeightError,
)

QUICK = {"steps": 300, "progress": False}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small checkpoint: two layers, query and value of different shapes and spread."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        tensors[f"layer.{layer}.q_proj.weight"] = torch.randn(48, 40, generator=generator) * 0.02
        tensors[f"layer.{layer}.v_proj.weight"] = torch.randn(16, 40, generator=generator) * 0.08
        tensors[f"layer.{layer}.mlp.weight"] = torch.randn(80, 40, generator=generator)
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("options"), [{"steps": 20_000}, {"steps": 8_000, "loss": "frobenius"}])
def test_the_real_model_reaches_the_minimum(minilm: Path, options: dict[str, object]) -> None:
    """Excess at most 1e-5 on every query and value matrix, measured against a full SVD of the file's weights."""
    factors = approximate_model(minilm, rank=8, progress=False, **options)  # type: ignore[arg-type]
    assert len(factors) == 12
    weights = load_file(minilm / "model.safetensors")
    for name, one in factors.items():
        W = weights[f"{name}.weight"].double()
        least = float(torch.linalg.svdvals(W)[8:].square().sum())
        loss = float((W - one.B.double() @ one.A.double()).square().sum())
        assert loss / least - 1 <= 1e-5
        assert one.certificate.excess == pytest.approx(loss / least - 1, abs=1e-10)
        assert one.source_sha256 == hashlib.sha256(weights[f"{name}.weight"].numpy().tobytes()).hexdigest()


def test_backends_agree(model: Path) -> None:
    cpu = approximate_model(model, rank=4, backend="cpu", **QUICK)
    reference = approximate_model(model, rank=4, backend="reference", **QUICK)
    for name in cpu:
        product = reference[name].product()
        # 300 steps of float32 rounding on either side.
        assert float((cpu[name].product() - product).norm() / product.norm()) < 600 * 2.0**-24


def test_the_same_run_gives_the_same_bytes(model: Path) -> None:
    first = approximate_model(model, rank=4, cache=False, **QUICK).to_bytes()
    assert approximate_model(model, rank=4, cache=False, concurrency=1, **QUICK).to_bytes() == first
    assert approximate_model(model, rank=4, cache=True, **QUICK).to_bytes() == first
    assert approximate_model(model, rank=4, cache=True, **QUICK).to_bytes() == first
    assert approximate_model(model, rank=4, cache=False, seed=1, **QUICK).to_bytes() != first


def test_a_finished_matrix_is_found_again_also_in_a_model_that_moved(model: Path, own_cache: Path) -> None:
    approximate_model(model, rank=4, **QUICK)
    entries = {path: path.stat().st_ino for path in own_cache.rglob("*.safetensors")}
    assert len(entries) == 4
    moved = model.parent.parent / "elsewhere.safetensors"
    model.rename(moved)
    approximate_model(moved, rank=4, **QUICK)
    assert {path: path.stat().st_ino for path in own_cache.rglob("*.safetensors")} == entries
    approximate_model(moved, rank=4, lr=1e-3, **QUICK)
    assert len(list(own_cache.rglob("*.safetensors"))) == 8


def test_a_damaged_cache_entry_is_made_again(model: Path, own_cache: Path) -> None:
    first = approximate_model(model, rank=4, **QUICK).to_bytes()
    for entry in own_cache.rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-5])
    assert approximate_model(model, rank=4, **QUICK).to_bytes() == first


def test_a_cache_that_cannot_be_written_costs_a_warning(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INILORA_CACHE", str(model))  # a file, not a folder
    with pytest.warns(UserWarning, match="not cached"):
        approximate_model(model, rank=4, **QUICK)


def test_kill_and_resume(minilm: Path, own_cache: Path, tmp_path: Path) -> None:
    """kill -9 once some matrices are finished; the next run takes them up and writes the unbroken run's bytes."""
    arguments = ["approximate", str(minilm), "--steps", "1500", "--no-progress", "-o"]
    command = [sys.executable, "-c", "from inilora_kernels.cli.main import main; main()", *arguments]
    interrupted, unbroken = tmp_path / "interrupted.safetensors", tmp_path / "unbroken.safetensors"
    process = subprocess.Popen([*command, str(interrupted)], stdout=subprocess.DEVNULL)
    while len(list(own_cache.rglob("*.safetensors"))) < 2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ended early with status {process.wait(timeout=0.02)}")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_ino for path in own_cache.rglob("*.safetensors") if path.name[0] != "."}
    assert 2 <= len(finished) < 12
    assert not interrupted.exists()

    subprocess.run([*command, str(interrupted)], check=True, stdout=subprocess.DEVNULL)
    now = {path: path.stat().st_ino for path in own_cache.rglob("*.safetensors") if path.name[0] != "."}
    assert len(now) == 12
    assert finished.items() <= now.items()

    environment = {**os.environ, "INILORA_CACHE": str(tmp_path / "other cache")}
    subprocess.run([*command, str(unbroken)], check=True, stdout=subprocess.DEVNULL, env=environment)
    assert interrupted.read_bytes() == unbroken.read_bytes()


def test_start_deviation_is_the_mean_of_the_kind_or_of_all(model: Path) -> None:
    weights = load_file(model)
    queries = [weights[f"layer.{layer}.q_proj.weight"].std() for layer in range(2)]
    values = [weights[f"layer.{layer}.v_proj.weight"].std() for layer in range(2)]
    of_queries, of_values = torch.stack(queries).mean(), torch.stack(values).mean()
    of_all = torch.stack(queries + values).mean()

    def start(init_std: str | float) -> FactorSet:
        return approximate_model(model, rank=4, steps=0, init_std=init_std, progress=False)

    by_kind, by_all, unit = start("kind"), start("global"), start(1.0)
    for name in unit:
        expected = of_queries if "q_proj" in name else of_values
        torch.testing.assert_close(by_kind[name].A, unit[name].A * expected, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(by_all[name].B, unit[name].B * of_all, rtol=1e-5, atol=0.0)


def test_a_matrix_starts_the_same_wherever_it_stands(model: Path) -> None:
    W = load_file(model)["layer.1.q_proj.weight"]
    whole = approximate_model(model, rank=4, init_std=0.02, **QUICK)["layer.1.q_proj"]
    alone = approximate(W, rank=4, init_std=0.02, **QUICK)
    listed = approximate([torch.ones(9, 9), W], rank=4, init_std=0.02, **QUICK)
    assert isinstance(alone, Factors)
    assert isinstance(listed, list)
    assert torch.equal(whole.A, alone.A)
    assert torch.equal(whole.A, listed[1].A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_factorized_as_the_values_they_hold(dtype: torch.dtype) -> None:
    W = (torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    factors = approximate(W, rank=3, steps=3000, lr=2e-3)
    assert isinstance(factors, Factors)
    least = float(torch.linalg.svdvals(W.double())[3:].square().sum())
    assert factors.certificate.optimum == pytest.approx(least, rel=1e-12)
    assert factors.certificate.excess < 1e-3


Damage = Callable[[Path], None]


def change(name: str, tensor: torch.Tensor) -> Damage:
    def damage(path: Path) -> None:
        save_file({**load_file(path), name: tensor}, path)

    return damage


def with_entry(value: float) -> torch.Tensor:
    W = torch.ones(48, 40)
    W[5, 7] = value
    return W


@pytest.mark.parametrize(
    ("damage", "options", "error", "message"),
    [
        (None, {"target_modules": ["nothing"]}, TargetError, "nothing"),
        (None, {"rank": 17}, WeightError, "v_proj.*rank 17.*16×40.*rank ≤ 16"),
        (None, {"rank": 0}, OptionError, "rank=0"),
        (None, {"rank": 2.5}, OptionError, "rank=2.5"),
        (None, {"steps": -1}, OptionError, "steps=-1"),
        (None, {"lr": float("nan")}, OptionError, "lr=nan"),
        (None, {"loss": "l1"}, OptionError, "loss='l1'.*mse, frobenius"),
        (None, {"solver": "newton"}, OptionError, "solver='newton'"),
        (None, {"method": "magic"}, OptionError, "method='magic'"),
        (None, {"tol": 0.0}, OptionError, "tol"),
        (None, {"init_std": "both"}, OptionError, "init_std='both'"),
        (None, {"init_std": -1.0}, OptionError, "init_std"),
        (None, {"checkpoint_steps": (400,)}, OptionError, "400"),
        (None, {"checkpoint_steps": 5}, OptionError, "checkpoint_steps=5: give a list"),
        (None, {"concurrency": 0}, OptionError, "concurrency=0"),
        (None, {"backend": "abacus"}, OptionError, "abacus"),
        (None, {"backend": "cpu", "device": "cuda"}, BackendError, "cuda"),
        (change("layer.1.q_proj.weight", with_entry(float("nan"))), {}, WeightError, r"layer.1.q_proj.*1 of.*\(5, 7\)"),
        (change("layer.1.q_proj.weight", with_entry(float("-inf"))), {}, WeightError, r"layer.1.q_proj.*Inf"),
        (change("layer.1.q_proj.weight", torch.ones(48, 0)), {}, WeightError, "layer.1.q_proj.*48×0.*no entries"),
        (change("layer.1.q_proj.weight", torch.ones(48, 40, dtype=torch.int8)), {}, WeightError, "layer.1.q_proj"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), {}, CheckpointError, "model.safetensors"),
        (lambda path: path.write_bytes(b"\0" * 100), {}, CheckpointError, "model.safetensors"),
        (lambda path: path.unlink(), {}, CheckpointError, "model.safetensors"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    model: Path, own_cache: Path, damage: Damage | None, options: dict[str, object], error: type, message: str
) -> None:
    if damage is not None:
        damage(model)
    with pytest.raises(error, match=message) as caught:
        approximate_model(model, **{"rank": 4, **QUICK, **options})  # type: ignore[arg-type]
    assert isinstance(caught.value, InitializationError)
    assert not own_cache.exists()


@pytest.mark.parametrize(
    "W",
    [
        torch.ones(3),
        torch.ones(2, 2, dtype=torch.int32),
        torch.ones(2, 2, 2),
        torch.ones(0, 2),
        torch.ones(2, 2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
)
def test_what_is_no_float_matrix_is_refused(W: torch.Tensor) -> None:
    with pytest.raises(WeightError, match="matrix 0"):
        approximate(W, rank=1)


def test_two_matrices_may_start_from_the_same_factors() -> None:
    W = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    start = approximate(W, rank=2, steps=5)
    one, other = approximate([W, W], rank=2, solver="krylov", start=[start, start])
    assert torch.equal(one.A, other.A)


def test_no_matrix_is_refused() -> None:
    with pytest.raises(WeightError, match="no matrix"):
        approximate([], rank=1)


def test_arrays_and_linear_layers_are_matrices_too() -> None:
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(5, 6)
    with torch.no_grad():
        layer.weight.copy_(W)
    expected = approximate(W, rank=2, solver="krylov").product()
    for same in (W.numpy(), layer):
        assert torch.equal(approximate(same, rank=2, solver="krylov").product(), expected)
    several = approximate([W, layer, W.numpy()], rank=2, solver="krylov")
    assert all(torch.equal(one.product(), expected) for one in several)


@pytest.mark.parametrize("given", [np.eye(3, dtype=np.int64), "matrix", {"weight": torch.eye(3)}, nn.Conv2d(1, 1, 1)])
def test_what_is_no_matrix_is_refused(given: Any) -> None:
    with pytest.raises(InitializationError, match="give a float tensor, a float array or a linear layer"):
        approximate(given if not isinstance(given, str) else [given], rank=1)


@pytest.mark.parametrize("given", [torch.eye(2), np.eye(2), None])
def test_what_is_no_model_is_answered_with_what_to_give(given: Any) -> None:
    with pytest.raises(InitializationError, match=f"was given a {type(given).__name__}; give a model's path or hub id"):
        approximate_model(given)
