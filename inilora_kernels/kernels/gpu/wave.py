"""A wave: matrices that step together on the GPU, two launches a step. `Wave` holds their buffers and work lists.

The buffers belong to a layout, not to matrices: the next wave of the same layout moves into them by a few copies, so
that graphs captured on them stay good for a whole run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backend import Problem, Schedule
from ..rounding import round_up
from .kernels import adam_kernel, gradient_products_kernel
from .layout import Layout, Place, idle
from .loss import COLUMNS, ROWS, WARPS, loss_kernel
from .tiles import ALIGNMENT

# Powers of two that float16's halves keep between a factor's largest likely entry and overflow at 2¹⁶.
FLOAT16_HEADROOM = 4


@dataclass(frozen=True, eq=False)
class Start:
    """What a wave's matrices start from, on the host: one float32 vector, as it lies on the device.

    factors, then the shares that make the first Gram matrices, then float16's exponents and Adam's eps a matrix.
    """

    values: Tensor

    @staticmethod
    def size(layout: Layout) -> int:
        return layout.factors + layout.shares + 2 * round_up(len(layout.places), ALIGNMENT)


def start_of(layout: Layout, problems: Sequence[Problem], schedule: Schedule, norms: Sequence[float]) -> Start:
    """norms: ||W||_F of each matrix, for float16 weights; 0 for others, which need no exponent."""
    values = torch.zeros(Start.size(layout), dtype=torch.float32)
    factors, shares, exponents, epsilons = _parts(values, layout)
    square = layout.tiles.rank**2
    for index, (place, problem) in enumerate(zip(layout.places, problems, strict=True)):
        A, B = _views(factors, place)
        A.copy_(problem.A)
        B.copy_(problem.B)
        # The first step's Gram matrices come in as a single share each; the other shares are zero.
        for offset, gram in (
            (place.A_shares_offset, A.double() @ A.double().T),
            (place.B_shares_offset, B.double().T @ B.double()),
        ):
            share = shares[offset:][:square].view(layout.tiles.rank, layout.tiles.rank)
            share[: place.rank, : place.rank] = gram.float()
        if norms[index] > 0:
            exponents[index] = _half_exponent(norms[index], problem)
        epsilons[index] = schedule.eps_for((place.rows, place.columns))
    return Start(values)


def _parts(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = round_up(len(layout.places), ALIGNMENT)
    shares, exponents = layout.factors, layout.factors + layout.shares
    return values[:shares], values[shares:exponents], values[exponents:-count], values[-count:]


def _views(factors: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    A = factors[place.A_offset :][: place.rank * place.row_stride].view(place.rank, place.row_stride)
    B = factors[place.B_offset :][: place.rank * place.column_stride].view(place.rank, place.column_stride)
    return A[:, : place.columns], B[:, : place.rows].T


def padded_view(weights: Tensor, place: Place) -> Tensor:
    """W's rows (d × k rounded up) in a buffer of a whole wave's weights."""
    return weights[place.W_offset :][: place.rows * place.row_stride].view(place.rows, place.row_stride)


class Wave:
    """The device state of matrices that share a dtype and a padded rank, and the launches that advance and judge it.

    weights: every W (d×k), its rows padded with zeros to `aligned(k)`.  rates: see `rate_table`, shared by all waves.
    resident: whether W is to stay in the cache; see the kernels' W_POLICY.
    active: the matrices still running; `keep` makes the others' programs idle.
    """

    def __init__(
        self, layout: Layout, dtype: torch.dtype, rates: Tensor, schedule: Schedule, *, resident: bool = True
    ) -> None:
        device = rates.device
        self.layout, self.rates, self.resident = layout, rates, resident
        self.betas = (schedule.beta1, schedule.beta2, 1 - schedule.beta1, 1 - schedule.beta2)

        def zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.weights = zeros(layout.weights, dtype)
        self.state = zeros(Start.size(layout))
        self.factors, self.shares, self.exponents, self.epsilons = _parts(self.state, layout)
        # A step on zeros, before any matrix has come, must not divide by zero.
        self.epsilons.fill_(1)
        self.means, self.squares = zeros(layout.factors), zeros(layout.factors)
        self.slots, self.grams = zeros(layout.slots), zeros(layout.grams)
        self.losses = zeros(layout.strip_programs, torch.float64)
        self.step = zeros(1, torch.int32)
        self._work = [layout.strip_work(), layout.sum_work(), layout.block_work()]
        self.strips, self.sums, self.blocks = (torch.tensor(work, device=device) for work in self._work)
        self.active = tuple(range(len(layout.places)))

    def begin(self, start: Tensor) -> None:
        """Take up new matrices, whose weights are in place: their start, no moments, step 0, everyone at work."""
        self.state.copy_(start, non_blocking=True)
        for buffer in (self.means, self.squares, self.step):
            buffer.zero_()
        if len(self.active) < len(self.layout.places):
            self.keep(range(len(self.layout.places)))

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """A (r×k) and B (d×r) of one matrix: views of the device's state."""
        return _views(self.factors, self.layout.places[index])

    def weight(self, index: int) -> Tensor:
        """W (d×k) of one matrix, without its padding: a view."""
        place = self.layout.places[index]
        return padded_view(self.weights, place)[:, : place.columns]

    def keep(self, active: Sequence[int]) -> None:
        """Go on with these matrices alone. The grids stay as they are, so that a captured graph stays good."""
        self.active = tuple(active)
        finished = set(range(len(self.layout.places))) - set(self.active)
        work = [rows.copy() for rows in self._work]
        idle(work, finished)
        for rows, buffer in zip(work, (self.strips, self.sums, self.blocks), strict=True):
            buffer.copy_(torch.from_numpy(rows))

    def advance(self, steps: int) -> None:
        """Launch `steps` steps: two kernels each, nothing else."""
        for _ in range(steps):
            self.multiply()
            self.update()

    def multiply(self) -> None:
        """The first launch: P and Q shares of every strip, and the Gram matrices."""
        tiles = self.layout.tiles
        strip = tiles.strip
        gradient_products_kernel[(len(self.sums) + len(self.strips),)](
            self.weights,
            self.factors,
            self.slots,
            self.shares,
            self.grams,
            self.exponents,
            self.step,
            self.strips,
            self.sums,
            len(self.sums),
            RANK=tiles.rank,
            ROWS=strip.rows,
            COLUMNS=strip.columns,
            STAGES=strip.stages,
            SUM_BLOCK=tiles.sum_block,
            SUM_WIDTH=tiles.sum_width,
            SPLIT=self.weights.dtype != torch.float32,
            PRECISION=tiles.precision,
            PREFETCH=strip.stages == 1,
            INTERPRETED=self.factors.device.type == "cpu",
            W_POLICY="evict_last" if self.resident else "evict_first",
            SLOT_POLICY="evict_first" if self.resident else "evict_last",
            num_warps=strip.warps,
            num_stages=strip.stages,
            enable_fp_fusion=True,
            **dict(tiles.options),
        )

    def update(self) -> None:
        """The second launch: Adam on every block of every factor."""
        tiles = self.layout.tiles
        block = tiles.block
        adam_kernel[(len(self.blocks),)](
            self.factors,
            self.means,
            self.squares,
            self.slots,
            self.shares,
            self.grams,
            self.step,
            self.rates,
            self.epsilons,
            self.blocks,
            *self.betas,
            RANK=tiles.rank,
            WIDTH=block.width,
            SLOTS=block.slots,
            INNER=block.inner,
            PRECISION=tiles.precision,
            num_warps=block.warps,
            num_stages=1,
            enable_fp_fusion=True,
            **dict(tiles.options),
        )

    def judge(self, *, wide: bool) -> None:
        """One launch: every strip's share of ||W − BA||² to `losses`. wide: in float64 throughout; see loss.py."""
        loss_kernel[(len(self.strips),)](
            self.weights,
            self.factors,
            self.losses,
            self.strips,
            WIDE=wide,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )

    def sampled(self) -> dict[int, tuple[float, Tensor, Tensor]]:
        """Each active matrix's loss, A and B on the CPU, after `judge`: two copies for the whole wave."""
        partial, factors = self.losses.cpu(), self.factors.cpu()
        found, first = {}, 0
        for index, place in enumerate(self.layout.places):
            count = place.strips * place.chunks
            if index in self.active:
                A, B = _views(factors, place)
                # Copies, so that a sample neither changes with the state nor keeps the whole wave's alive.
                loss = math.fsum(partial[first : first + count].tolist())
                found[index] = (loss, A.clone().contiguous(), B.contiguous().clone())
            first += count
        return found


def rate_table(schedule: Schedule, steps: int) -> Tensor:
    """lr/(1−β₁ⁱ⁺¹) and 1/(1−β₂ⁱ⁺¹) of every step i, computed in float64, float32 (steps, 2)."""
    step = np.arange(steps)
    decays = (step + 1) // schedule.step_size
    rate = schedule.lr * schedule.gamma ** decays.astype(np.float64)
    power = (step + 1).astype(np.float64)
    table = np.stack([rate / (1 - schedule.beta1**power), 1 / (1 - schedule.beta2**power)], axis=1)
    return torch.from_numpy(table.astype(np.float32))


def _half_exponent(norm: float, problem: Problem) -> int:
    """The power of two by which float16 halves of this matrix's factors are multiplied.

    Balanced factors of W have no entry above √||W||; the start may be wider. The bound goes FLOAT16_HEADROOM powers
    below overflow, which leaves the low halves 2²⁴ times finer than the largest entries.
    """
    bound = max(math.sqrt(norm), float(problem.A.abs().max()), float(problem.B.abs().max()), 2.0**-30)
    return max(-40, min(40, 16 - FLOAT16_HEADROOM - math.ceil(math.log2(bound))))
