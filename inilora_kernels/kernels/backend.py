"""What a backend is: the only door between the solvers and the kernels.

A backend runs Adam on min ||W − BA||_F² for a batch of matrices and shows each matrix's state at the milestones it was
given. The order of the matrices is its own business: a CPU runs one matrix through many steps, so that W stays in
cache; a GPU runs all matrices a step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One matrix W (d×k) to approximate, and the factors A (r×k), B (d×r), float32, to start from.

    load: reads W, of `dtype`, the checkpoint's own. A backend calls it once, when it first needs W, perhaps in a thread
        of its own, and keeps W only for this matrix's run.
    """

    load: Callable[[], Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True)
class Schedule:
    """Adam's settings, and StepLR's, in the authors' order: the scheduler steps before the optimizer.

    eps belongs to the gradient of ||W − BA||_F², the sum, whose gradient every kernel forms. The mean over the d·k
    entries is the same Adam with eps·d·k in its place, since both moments scale with the gradient: see `eps_for`.

    >>> schedule = Schedule(steps=20_000, lr=5e-4, step_size=5_000, gamma=0.9, loss="mse")
    >>> schedule.learning_rate(4_998), round(schedule.learning_rate(4_999), 6)
    (0.0005, 0.00045)
    """

    steps: int
    lr: float
    step_size: int
    gamma: float
    loss: str
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def learning_rate(self, step: int) -> float:
        """The rate of step i, counted from 0: lr · gamma^⌊(i+1)/step_size⌋."""
        return float(self.lr * self.gamma ** ((step + 1) // self.step_size))

    def eps_for(self, shape: tuple[int, int]) -> float:
        """Adam's eps for the gradient of the sum that equals `eps` on the gradient of the chosen loss."""
        return self.eps * shape[0] * shape[1] if self.loss == "mse" else self.eps


@dataclass(frozen=True, eq=False)
class Sample:
    """A matrix's state after `step` steps: float32 factors on the CPU and f = ||W − BA||_F² in float64."""

    index: int
    step: int
    loss: float
    A: Tensor
    B: Tensor


def _go_on(_: Sample) -> bool:
    return True


def _count_nothing(_: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Batch:
    """Matrices to run Adam on together, and whom to tell.

    milestones: the steps at which each matrix is shown, ascending; the last one ends the run.
    observe: called in the caller's thread with each matrix's state at each milestone; False ends that matrix.
    advanced: called in the caller's thread now and then with the number of matrix-steps done since the last call.
    """

    problems: Sequence[Problem]
    schedule: Schedule
    milestones: Sequence[int]
    observe: Callable[[Sample], bool] = _go_on
    advanced: Callable[[int], None] = _count_nothing


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix W to decompose. load, shape, dtype: as in Problem.

    rank: of the leading triplets that are wanted, the largest. vectors: that its search may take; 0: none.
    """

    load: Callable[[], Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    vectors: int


# Vectors that a batch is multiplied with at a time: as many as the matrix instructions want, free where memory is the
# limit.
WIDTH = 16
# The launches that a call makes, as one graph to replay; None where they have to be made one by one.
Captured = Callable[[Callable[[], None]], Callable[[], None] | None]


def no_graph(launch: Callable[[], None]) -> None:
    """`Captured` of a device without graphs."""


class GramBatch(Protocol):
    """Matrices on a device that are multiplied together. M = WᵀW is n×n, n the smaller side of W; see krylov_batch."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """n of each matrix."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the blocks that `__call__` takes: (matrices or more, rows, n or more, a multiple of 64)."""

    @property
    def energies(self) -> Tensor:
        """||W||_F² of each matrix or more, float64, on the device."""

    def __call__(self, X: Tensor) -> Tensor:
        """XM of each matrix's block of rows of at most unit length, float32, without waiting for the device.

        The next call overwrites it.
        """

    @property
    def captured(self) -> Captured:
        """Makes graphs of launches, products among them."""

    def keep(self, active: Collection[int]) -> None:
        """Go on with these matrices alone; the products of the others mean nothing."""

    def tall(self, index: int) -> Tensor:
        """One W, or Wᵀ where W is wide, on the device."""

    def stored(self, index: int) -> Tensor:
        """One W as it was loaded, on the device."""


# Called with indices of matrices and the batch that they make.
Visit = Callable[[Sequence[int], GramBatch], None]


class Backend(Protocol):
    """A set of kernels on a device."""

    @property
    def name(self) -> str:
        """As in `load_backend`."""

    @property
    def device(self) -> torch.device:
        """The device that its matrices are on."""

    @property
    def direct_dtype(self) -> torch.dtype:
        """The dtype of the direct solver's products with W."""

    def require_adam(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
        """Raise BackendError if `adam` cannot take such a matrix; reads nothing."""

    def adam(self, batch: Batch) -> None:
        """Run Adam on every problem of the batch up to its last milestone."""

    def gram_batches(self, matrices: Sequence[Stored], visit: Visit) -> None:
        """Call `visit` with the indices of matrices that are best multiplied together, and with their batch.

        Matrices that it does not come to, on a CPU all of them, are decomposed one after the other.
        """
