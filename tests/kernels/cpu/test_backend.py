"""The CPU kernels against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inilora_kernels.kernels.backend import Batch, Problem, Sample, Schedule
from inilora_kernels.kernels.cpu.backend import CpuBackend, pack
from inilora_kernels.kernels.reference import ReferenceBackend

from .cases import problem


def run(backend: CpuBackend | ReferenceBackend, problems: list[Problem], schedule: Schedule) -> list[Sample]:
    samples: list[Sample] = []

    def observe(sample: Sample) -> bool:
        samples.append(sample)
        return True

    backend.adam(Batch(problems, schedule, [schedule.steps], observe))
    return sorted(samples, key=lambda sample: sample.index)


FLOAT64 = ReferenceBackend(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("loss", ["mse", "frobenius"])
@pytest.mark.parametrize(
    ("d", "k", "rank", "dtype"),
    [
        (384, 384, 8, torch.float32),
        (130, 257, 8, torch.float16),
        (257, 130, 12, torch.bfloat16),
        (40, 60, 40, torch.float32),
        (1, 9, 1, torch.float32),
        (9, 1, 1, torch.bfloat16),
        (2, 2, 2, torch.float64),
        (700, 90, 5, torch.float32),
    ],
)
def test_trajectory(d: int, k: int, rank: int, dtype: torch.dtype, loss: str) -> None:
    one = problem(d, k, rank, dtype)
    schedule = Schedule(300, 5e-4, 100, 0.8, loss)
    (mine,), (truth,) = run(CpuBackend(2), [one], schedule), run(FLOAT64, [one], schedule)
    product = truth.B @ truth.A
    # Adam divides by √v, so float32's rounding of small gradients enters in full; it stays below 300 · 2⁻²⁴.
    assert float((mine.B @ mine.A - product).norm() / product.norm()) < 300 * 2.0**-24
    assert mine.loss == pytest.approx(truth.loss, rel=300 * 2.0**-24)


def test_factors_after_2000_steps() -> None:
    """The bar of the CPU backend: BA within 1e-4 of the reference after 2,000 steps."""
    one = problem(384, 256, 8)
    schedule = Schedule(2000, 5e-4, 5000, 0.9, "mse")
    (mine,), (truth,) = run(CpuBackend(2), [one], schedule), run(FLOAT64, [one], schedule)
    product = truth.B @ truth.A
    assert float((mine.B @ mine.A - product).norm() / product.norm()) < 1e-4


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Alone or together, on a matrix of several slots and one of a single strip."""
    problems = [problem(3100, 200, 8), problem(100, 500, 8), problem(700, 700, 6)]
    schedule = Schedule(50, 5e-4, 20, 0.9, "mse")
    runs = [run(CpuBackend(threads), problems, schedule) for threads in (1, 2, 3, 2)]
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert torch.equal(one.A, same.A)
            assert torch.equal(one.B, same.B)
            assert one.loss == same.loss


def test_the_loss_is_the_residual_of_the_checkpoints_own_weights() -> None:
    one = problem(500, 300, 4, torch.bfloat16)
    (sample,) = run(CpuBackend(2), [one], Schedule(0, 5e-4, 10, 0.9, "mse"))
    assert torch.equal(sample.A, one.A)
    residual = one.load().double() - one.B.double() @ one.A.double()
    assert sample.loss == pytest.approx(float(residual.square().sum()), rel=1e-12)


def test_packing_keeps_every_entry_and_pads_with_zeros() -> None:
    W = torch.arange(1.0, 401 * 131 + 1).view(401, 131)
    tiles = pack(W).tiles
    unpacked = tiles.permute(0, 2, 1, 3).reshape(tiles.shape[0] * tiles.shape[2], -1)
    assert torch.equal(unpacked[:401, :131], W)
    assert int((tiles != 0).sum()) == W.numel()


def test_a_matrix_can_be_stopped_and_the_others_go_on() -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}

    def observe(sample: Sample) -> bool:
        seen[sample.index].append(sample.step)
        return sample.index == 1

    problems = [problem(60, 50, 3), problem(50, 60, 3)]
    CpuBackend(2).adam(Batch(problems, Schedule(30, 1e-3, 10, 0.9, "mse"), [10, 20, 30], observe))
    assert seen == {0: [10], 1: [10, 20, 30]}


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_in_the_caller_ends_the_run(threads: int) -> None:
    def observe(sample: Sample) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CpuBackend(threads).adam(Batch([problem(60, 50, 3)] * 4, Schedule(30, 1e-3, 10, 0.9, "mse"), [10, 30], observe))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_while_reading_ends_the_run(threads: int) -> None:
    def fail() -> torch.Tensor:
        raise OSError("gone")

    bad = Problem(fail, (60, 50), torch.float32, torch.zeros(3, 50), torch.zeros(60, 3))
    with pytest.raises(OSError, match="gone"):
        CpuBackend(threads).adam(Batch([problem(60, 50, 3), bad] * 2, Schedule(9, 1e-3, 10, 0.9, "mse"), [9]))


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])
def test_narrower_vector_units(cpu: str, tmp_path: Path) -> None:
    """The kernels built for AVX2 and for SSE2, run in a process of their own."""
    if "x86" not in os.uname().machine:
        pytest.skip("builds for x86 run on x86")
    features = {"haswell": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2", "x86-64": "+sse2"}[cpu]
    tests = "test_trajectory or test_gradient_products or test_any_number or test_against_hashlib"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent), "-k", tests],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_steps_report_every_matrix_step() -> None:
    done: list[int] = []
    problems = [problem(60, 50, 3)] * 3
    CpuBackend(2).adam(Batch(problems, Schedule(25, 1e-3, 10, 0.9, "mse"), [10, 25], advanced=done.append))
    assert sum(done) == 75
