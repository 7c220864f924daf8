"""The reference kernels against autograd and torch's own optimizer, in float64."""

from __future__ import annotations

import pytest
import torch

from inilora_kernels.kernels.backend import Schedule
from inilora_kernels.kernels.reference import AdamState, adam_step, gradients, residual_loss


def matrices(d: int, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(d * k + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.05

    return normal(d, k), normal(rank, k), normal(d, rank)


@pytest.mark.parametrize(("d", "k", "rank"), [(12, 20, 3), (20, 12, 12), (1, 9, 1), (7, 1, 1)])
def test_gradients_are_those_of_autograd(d: int, k: int, rank: int) -> None:
    W, A, B = matrices(d, k, rank)
    A.requires_grad_()
    B.requires_grad_()
    (W - B @ A).square().sum().backward()
    of_A, of_B = gradients(W, A.detach(), B.detach())
    # Two orders of summing the same products of float64 numbers of order 1.
    torch.testing.assert_close(of_A, A.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of_B, B.grad, rtol=1e-12, atol=1e-14)


def test_residual_loss_sums_the_squares_of_the_residual_and_leaves_W_alone() -> None:
    W, A, B = matrices(3000, 2000, 2)  # more than one strip
    before = W.clone()
    assert residual_loss(W, A, B) == pytest.approx(float((W - B @ A).square().sum()), rel=1e-12)
    assert torch.equal(W, before)


@pytest.mark.parametrize("loss", ["mse", "frobenius"])
def test_trajectory_is_that_of_torch_adam_with_step_lr(loss: str) -> None:
    """500 steps against torch.optim.Adam and StepLR in the authors' order: the scheduler steps first."""
    W, A, B = matrices(24, 36, 4)
    schedule = Schedule(steps=500, lr=5e-3, step_size=150, gamma=0.5, loss=loss)
    state = AdamState.start(A, B)
    A_torch, B_torch = A.clone().requires_grad_(), B.clone().requires_grad_()
    optimizer = torch.optim.Adam([A_torch, B_torch], lr=schedule.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, schedule.step_size, schedule.gamma)
    for step in range(schedule.steps):
        adam_step(W, state, step, schedule)
        optimizer.zero_grad()
        squares = (B_torch @ A_torch - W).square()
        (squares.mean() if loss == "mse" else squares.sum()).backward()
        if step == 0:
            # Not yet stepped: torch warns when the scheduler goes before the first optimizer step, as it does here.
            with pytest.warns(UserWarning, match="lr_scheduler"):
                scheduler.step()
        else:
            scheduler.step()
        optimizer.step()
    # Rounding of float64 (1e-16), amplified over 500 steps.
    torch.testing.assert_close(state.A, A_torch.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.B, B_torch.detach(), rtol=1e-9, atol=1e-11)
