"""What a run says of its cost, of the cache, and when it is cut off."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels import approximate_model, estimate
from inilora_kernels.estimate import Work
from inilora_kernels.kernels.gpu.gpus import gpu_named
from inilora_kernels.storage import cache

# The processor of docs/performance.md.
SPEED = 188e9
LLAMA2_7B = [Work((4096, 4096), 2, 8)] * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"l.{i}.{name}_proj.weight": torch.randn(9, 7, generator=generator) for i in range(6) for name in "qv"}, path
    )
    return path


def test_a_long_run_is_announced_with_the_solver_that_is_faster() -> None:
    said = estimate.notice(LLAMA2_7B, "adam", 20_000, speed=SPEED)
    assert said is not None
    assert "about 82 min on this processor (20,000 Adam steps, 64 matrices; an estimate)" in said
    assert "solver krylov finds the same product BA in about 17 s" in said
    assert estimate.notice(LLAMA2_7B, "krylov", 0, speed=SPEED) is None
    card = gpu_named("rtx4090")
    assert estimate.seconds(LLAMA2_7B, "adam", 20_000, speed=SPEED, card=card) < 60
    assert estimate.notice(LLAMA2_7B * 4, "adam", 20_000, speed=SPEED, card=card) is not None


@pytest.mark.parametrize(
    ("work", "solver", "measured"),
    [
        # docs/performance.md: ms a step of all matrices, and ms a matrix.
        ([Work((768, 768), 4, 8)] * 24, "adam", 2.76e-3),
        ([Work((768, 768), 4, 32)] * 24, "adam", 11.4e-3),
        ([Work((2048, 2048), 4, 8)] * 8, "adam", 7.59e-3),
        ([Work((4096, 4096), 4, 32)] * 4, "adam", 57.8e-3),
        ([Work((4096, 4096), 2, 8)], "exact", 11.7),
    ],
)
def test_the_model_is_near_the_measurements(work: list[Work], solver: str, measured: float) -> None:
    if solver == "adam":
        predicted = estimate.adam_seconds(work, 1, SPEED)
    else:
        predicted = sum(estimate.direct_seconds(one, solver, SPEED) for one in work)
    assert predicted == pytest.approx(measured, rel=0.34)


def test_approximate_model_warns_once_of_a_long_run(
    model: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(estimate, "WORTH_SAYING", 1e-6)
    approximate_model(model, rank=1, steps=5, cache=False, progress=False)
    (said,) = [str(one.message) for one in recwarn if "an estimate" in str(one.message)]
    assert "5 Adam steps, 12 matrices" in said


def test_what_the_cache_has_is_said_and_what_an_interrupted_run_keeps(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own_cache: Path
) -> None:
    keep, kept = cache.keep, []

    def interrupted_after_nine(*entry: object) -> None:
        if len(kept) == 9:
            raise KeyboardInterrupt
        keep(*entry)  # type: ignore[arg-type]
        kept.append(entry)

    monkeypatch.setattr(cache, "keep", interrupted_after_nine)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped: 9 of 12 matrices are finished and kept in .*cache; run it"):
        approximate_model(model, rank=1, solver="krylov", progress=False)
    monkeypatch.setattr(cache, "keep", keep)
    with caplog.at_level(logging.INFO, logger="inilora_kernels"):
        approximate_model(model, rank=1, solver="krylov", progress=False)
    assert "9 of 12 matrices found in the cache" in caplog.messages
    assert "solving 3 matrices" in caplog.messages
