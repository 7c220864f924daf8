"""What a backend is given: the schedule, against torch's own, and a batch that nobody listens to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inilora_kernels.kernels.backend import Backend, Batch, Problem, Sample, Schedule
from inilora_kernels.kernels.cpu.backend import CpuBackend
from inilora_kernels.kernels.reference import ReferenceBackend

BACKENDS: dict[str, Backend] = {"cpu": CpuBackend(2), "reference": ReferenceBackend(torch.device("cpu"))}


def test_the_learning_rate_is_that_of_step_lr_stepped_before_the_optimizer() -> None:
    schedule = Schedule(steps=40, lr=0.3, step_size=7, gamma=0.5, loss="mse")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.lr)
    step_lr = torch.optim.lr_scheduler.StepLR(optimizer, schedule.step_size, schedule.gamma)
    optimizer.step()  # StepLR warns where it goes first
    for step in range(schedule.steps):
        step_lr.step()
        # StepLR multiplies the rate that it has, learning_rate takes a power; powers of two round neither.
        assert schedule.learning_rate(step) == pytest.approx(step_lr.get_last_lr()[0], rel=1e-14)


def test_adam_on_the_mean_is_adam_on_the_sum_with_a_larger_eps() -> None:
    """One step of torch's Adam on a gradient g/(d·k), whose size is near eps, and on g."""
    gradient = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-6
    schedule = Schedule(steps=1, lr=1e-2, step_size=1, gamma=1.0, loss="mse")
    moved = []
    for share, eps in ((1 / 30, schedule.eps), (1.0, schedule.eps_for((6, 5)))):
        x = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        x.grad = share * gradient
        torch.optim.Adam([x], lr=schedule.lr, eps=eps).step()
        moved.append(x.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-12, atol=0.0)
    assert Schedule(1, 1e-2, 1, 1.0, "frobenius").eps_for((6, 5)) == schedule.eps


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_runs_to_its_last_milestone_though_nobody_listens(name: str) -> None:
    """Loading is all that such a run shows of itself; with someone listening it comes to the same end."""
    loads: list[int] = []

    def load() -> torch.Tensor:
        loads.append(1)
        return torch.eye(9)

    problem = Problem(load, (9, 9), torch.float32, torch.ones(2, 9), torch.ones(9, 2))
    schedule = Schedule(steps=3, lr=1e-2, step_size=2, gamma=0.5, loss="mse")
    BACKENDS[name].adam(Batch([problem] * 3, schedule, [1, 3]))
    assert len(loads) == 3
    seen: list[tuple[int, int]] = []

    def observe(sample: Sample) -> bool:
        seen.append((sample.index, sample.step))
        return True

    BACKENDS[name].adam(Batch([problem] * 3, schedule, [1, 3], observe))
    assert sorted(seen) == [(index, step) for index in range(3) for step in (1, 3)]
