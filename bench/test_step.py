"""A step of Adam on a batch of matrices: the CPU backend against the paper's way, same threads, one run.

The peer runs at its best: with fused and with ordinary torch.optim.Adam, the faster counts. Both sides are warmed up
and measured in turns; the ratio is the median of the turns'. The last column compares with torch's own float32 matrix
product on the same threads: a step is 4·d·k·r FLOPs, and no kernel does more of them a second than the processor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from inilora_kernels.kernels.backend import Batch, Problem, Schedule
from inilora_kernels.kernels.cpu.backend import CpuBackend

from .harness import Row, seconds
from .paper_way import PaperWay

TURNS = 5
# Steps of ours in a turn; long enough that packing W, done once a matrix, does not count.
STEPS = {384: 3000, 768: 600, 2048: 80, 4096: 24}


@pytest.fixture(scope="module")
def matrix_product() -> float:
    """FLOP/s of torch.mm on 4096×4096 float32 matrices: the best of five."""
    X, Y = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return 2 * 4096**3 / min(seconds(lambda: torch.mm(X, Y)) for _ in range(5))


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize(("count", "size"), [(12, 384), (24, 768), (8, 2048), (4, 4096)])
def test_step(
    count: int,
    size: int,
    rank: int,
    matrix_product: float,
    benchmark: BenchmarkFixture,
    record: Callable[[Row], None],
) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(size, size) * 0.05 for _ in range(count)]
    A, B = torch.randn(rank, size) * 0.02, torch.randn(size, rank) * 0.02
    problems = [Problem(lambda W=W: W, (size, size), W.dtype, A, B) for W in matrices]
    backend = CpuBackend(torch.get_num_threads())

    def ours(steps: int) -> None:
        schedule = Schedule(steps, 5e-4, 5000, 0.9, "mse")
        backend.adam(Batch(problems, schedule, [steps]))

    peers = [PaperWay(matrices, rank, fused=fused) for fused in (False, True)]
    peer_steps = max(2, STEPS[size] // 60)
    steps = STEPS[size]
    ours(2)
    for peer in peers:
        peer.steps(1)
    mine, theirs = [], []
    for _ in range(TURNS):
        # A run of one step has the same packing and the same final loss: the difference is the steps alone.
        mine.append((seconds(lambda: ours(steps)) - seconds(lambda: ours(1))) / (steps - 1))
        theirs.append(min(seconds(lambda peer=peer: peer.steps(peer_steps)) / peer_steps for peer in peers))
    ratio = statistics.median(slow / fast for slow, fast in zip(theirs, mine, strict=True))
    speed = 4 * count * size * size * rank / statistics.median(mine)
    row = {
        "matrices": f"{count}×{size}²",
        "rank": rank,
        "ours ms/step": 1e3 * statistics.median(mine),
        "paper's way ms/step": 1e3 * statistics.median(theirs),
        "ratio": ratio,
        "GFLOP/s": speed / 1e9,
        "of torch.mm": speed / matrix_product,
    }
    benchmark.extra_info.update(row)
    record(row)
    benchmark.pedantic(ours, args=(max(2, steps // 10),), rounds=1)
