"""What a run is predicted to take, against the measurements of docs/performance.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inilora_kernels import estimate
from inilora_kernels.estimate import Work
from inilora_kernels.kernels.cpu.cost_model import Machine
from inilora_kernels.kernels.gpu.gpus import gpu_named

# The processor of docs/performance.md.
ZEN4 = Machine(flops=188e9, alone=0.9e9, together=0.9e9, threads=2)
LLAMA2_7B = [Work((4096, 4096), 2, 8)] * 64


def test_a_long_run_is_announced_with_the_solver_that_is_faster() -> None:
    said = estimate.notice(LLAMA2_7B, "adam", 20_000, machine=ZEN4)
    assert said is not None
    assert "about 81 min on this processor (20,000 Adam steps, 64 matrices; an estimate)" in said
    assert "solver krylov finds the same product BA in about 7 s" in said
    assert estimate.notice(LLAMA2_7B, "krylov", 0, machine=ZEN4) is None
    card = gpu_named("rtx4090")
    assert estimate.seconds(LLAMA2_7B, "adam", 20_000, machine=ZEN4, card=card) < 60
    assert estimate.notice(LLAMA2_7B * 4, "adam", 20_000, machine=ZEN4, card=card) is not None


@pytest.mark.parametrize(
    ("work", "solver", "measured"),
    [
        # docs/performance.md: ms a step of all matrices, and ms a matrix.
        ([Work((768, 768), 4, 8)] * 24, "adam", 2.76e-3),
        ([Work((768, 768), 4, 32)] * 24, "adam", 11.4e-3),
        ([Work((2048, 2048), 4, 8)] * 8, "adam", 7.59e-3),
        ([Work((4096, 4096), 4, 32)] * 4, "adam", 57.8e-3),
        ([Work((4096, 4096), 2, 8)], "exact", 11.7),
        ([Work((4096, 4096), 2, 8)], "krylov", 0.135),
        ([Work((4096, 4096), 2, 32)], "krylov", 0.262),
        ([Work((5120, 5120), 2, 32)], "krylov", 0.368),
        ([Work((14336, 4096), 2, 32)], "krylov", 0.736),
        ([Work((2048, 2048), 2, 64)], "krylov", 0.185),
        ([Work((384, 384), 2, 32)], "krylov", 7.28e-3),
    ],
)
def test_the_model_is_near_the_measurements(work: list[Work], solver: str, measured: float) -> None:
    if solver == "adam":
        predicted = estimate.adam_seconds(work, 1, ZEN4)
    else:
        predicted = sum(estimate.direct_seconds(one, solver, ZEN4) for one in work)
    assert predicted == pytest.approx(measured, rel=0.34)


@pytest.mark.parametrize(
    ("works", "measured"),
    [
        # bench/results/solvers.md, Table 5 by krylov from file to file.
        (LLAMA2_7B, 6.3),
        ([Work((4096, 3072), 2, 8)] * 56, 4.3),
        ([Work((4096, 4096), 2, 8), Work((1024, 4096), 2, 8)] * 32, 5.7),
        ([Work((5120, 5120), 2, 8)] * 80, 11.4),
    ],
)
def test_a_whole_model_is_near_the_measurements(works: list[Work], measured: float) -> None:
    assert estimate.seconds(works, "krylov", 0, machine=ZEN4) == pytest.approx(measured, rel=0.34)


def test_a_run_reads_first_and_then_solves() -> None:
    reading = estimate.reading_seconds(LLAMA2_7B, ZEN4)
    adam = estimate.adam_seconds(LLAMA2_7B, 100, ZEN4)
    krylov = estimate.seconds(LLAMA2_7B, "krylov", 0, machine=ZEN4)
    assert estimate.seconds(LLAMA2_7B, "adam", 100, machine=ZEN4) == pytest.approx(krylov + adam)
    # A processor so fast that the file is the limit.
    assert estimate.seconds(LLAMA2_7B, "krylov", 0, machine=replace(ZEN4, flops=1e15)) == pytest.approx(
        reading, rel=0.3
    )
    assert estimate.seconds(LLAMA2_7B, "krylov", 0, machine=replace(ZEN4, alone=1e15, together=1e15)) == pytest.approx(
        krylov - reading
    )
