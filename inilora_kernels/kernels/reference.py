"""The definition of every kernel, in plain torch: what all other backends are tested against.

Each function works in the dtype of its arguments, so that float64 input gives the float64 truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Batch, Sample, Schedule, Stored, Visit


def gradient_products(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """P = BᵀW (r×k) and Q = WAᵀ (d×r): all that a step needs from W.

    >>> W, A, B = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    >>> gradient_products(W, A, B)
    (tensor([[3., 4.]]), tensor([[1.],
            [2.]]))
    """
    return B.T @ W, W @ A.T


def gradients(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """∂f/∂A = 2((BᵀB)A − P) (r×k) and ∂f/∂B = 2(B(AAᵀ) − Q) (d×r) of f = ||W − BA||_F² (paper, Eq. 3)."""
    P, Q = gradient_products(W, A, B)
    return 2 * (B.T @ B @ A - P), 2 * (B @ (A @ A.T) - Q)


def residual_loss(W: Tensor, A: Tensor, B: Tensor) -> float:
    """f = ||W − BA||_F² in float64, from the residual of a strip of rows at a time.

    >>> residual_loss(torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    1.0
    """
    A = A.double()
    rows = max(1, 2**22 // max(1, W.shape[1]))
    total = 0.0
    for start in range(0, W.shape[0], rows):
        strip = slice(start, start + rows)
        residual = torch.addmm(W[strip].double(), B[strip].double(), A, alpha=-1)
        total += float(residual.square_().sum())
    return total


@dataclass(eq=False)
class AdamState:
    """The factors of one matrix with Adam's two moments of each, all of one dtype."""

    A: Tensor
    B: Tensor
    A_mean: Tensor
    A_square: Tensor
    B_mean: Tensor
    B_square: Tensor

    @classmethod
    def start(cls, A: Tensor, B: Tensor) -> AdamState:
        zeros = torch.zeros_like
        return cls(A.clone(), B.clone(), zeros(A), zeros(A), zeros(B), zeros(B))


def adam_step(W: Tensor, state: AdamState, step: int, schedule: Schedule) -> None:
    """Step i (from 0) of Adam on f, both factors from the same gradients, in place.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  x ← x − η·m̂ / (√v̂ + ε)  with  m̂ = m/(1−β₁^{i+1}),  v̂ = v/(1−β₂^{i+1})
    """
    lr, eps = schedule.learning_rate(step), schedule.eps_for((W.shape[0], W.shape[1]))
    bias1 = 1 - schedule.beta1 ** (step + 1)
    bias2 = 1 - schedule.beta2 ** (step + 1)
    gradient_A, gradient_B = gradients(W, state.A, state.B)
    for x, mean, square, gradient in (
        (state.A, state.A_mean, state.A_square, gradient_A),
        (state.B, state.B_mean, state.B_square, gradient_B),
    ):
        mean.mul_(schedule.beta1).add_(gradient, alpha=1 - schedule.beta1)
        square.mul_(schedule.beta2).addcmul_(gradient, gradient, value=1 - schedule.beta2)
        x.addcdiv_(mean, (square / bias2).sqrt_().add_(eps), value=-lr / bias1)


@dataclass(frozen=True)
class ReferenceBackend:
    """Adam by the functions above, one matrix at a time; dtype=torch.float64 for the truth."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    name: str = "reference"
    direct_dtype: torch.dtype = torch.float64

    def gram_batches(self, matrices: Sequence[Stored], visit: Visit) -> None:
        """See `Backend.gram_batches`: none."""

    def require_adam(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
        """See `Backend.require_adam`: takes any."""

    def adam(self, batch: Batch) -> None:
        for index, problem in enumerate(batch.problems):
            W = problem.load().to(self.device, self.dtype)
            state = AdamState.start(problem.A.to(self.device, self.dtype), problem.B.to(self.device, self.dtype))
            step = 0
            for milestone in batch.milestones:
                done = milestone - step
                while step < milestone:
                    adam_step(W, state, step, batch.schedule)
                    step += 1
                batch.advanced(done)
                A, B = state.A.float().cpu(), state.B.float().cpu()
                loss = residual_loss(W, A.to(self.device), B.to(self.device))
                if not batch.observe(Sample(index, step, loss, A, B)):
                    break
