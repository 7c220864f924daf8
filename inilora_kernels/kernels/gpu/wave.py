"""A wave: matrices that step together on the GPU, two launches a step, laid out in a few long buffers.

`lay_out` is arithmetic alone: where everything of each matrix lies and how many bytes the wave takes, so that a wave
that does not fit is refused before anything is allocated. `Wave` holds the buffers and the kernels' work lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import Problem, Schedule
from .kernels import adam_kernel, gradient_products_kernel
from .tiles import Tiles, aligned

STRIP_FIELDS, SUM_FIELDS, BLOCK_FIELDS = 12, 4, 10
# Powers of two that float16's halves keep between a factor's largest likely entry and overflow at 2¹⁶.
FLOAT16_HEADROOM = 4


@dataclass(frozen=True)
class Place:
    """Where one matrix's state lies, as offsets in elements into the wave's buffers.

    rows, columns: d, k of W; row_stride, column_stride: k, d rounded up, the row lengths of A and Bᵀ.
    chunk: columns that one strip program takes.
    """

    rows: int
    columns: int
    rank: int
    row_stride: int
    column_stride: int
    chunk: int
    A: int
    B: int
    P: int
    Q: int
    A_gram: int
    B_gram: int
    A_shares: int
    B_shares: int

    def strips(self, tiles: Tiles) -> int:
        return math.ceil(self.rows / tiles.strip.rows)

    @property
    def chunks(self) -> int:
        return math.ceil(self.row_stride / self.chunk)

    def A_blocks(self, tiles: Tiles) -> int:
        return math.ceil(self.row_stride / tiles.block.width)

    def B_blocks(self, tiles: Tiles) -> int:
        return math.ceil(self.column_stride / tiles.block.width)


@dataclass(frozen=True)
class Layout:
    """The places of a wave's matrices and the sizes, in elements, of the float32 buffers they lie in."""

    tiles: Tiles
    places: tuple[Place, ...]
    factors: int
    slots: int
    shares: int
    grams: int

    @property
    def state_bytes(self) -> int:
        """Device bytes beside the weights: factors and two moments, slots, Gram matrices and their shares."""
        return 4 * (3 * self.factors + self.slots + self.shares + self.grams)


def weight_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Device bytes of a W (d×k) with its rows padded."""
    return shape[0] * aligned(shape[1]) * itemsize


def lay_out(shapes: Sequence[tuple[int, int]], ranks: Sequence[int], chunks: Sequence[int], tiles: Tiles) -> Layout:
    """Give each matrix its place, in order. chunks: into how many parts each matrix's columns are divided."""
    places = []
    factors = slots = shares = grams = 0
    square = tiles.rank * tiles.rank
    for (rows, columns), rank, parts in zip(shapes, ranks, chunks, strict=True):
        row_stride, column_stride = aligned(columns), aligned(rows)
        tile_columns = tiles.strip.columns
        place = Place(
            rows=rows,
            columns=columns,
            rank=rank,
            row_stride=row_stride,
            column_stride=column_stride,
            chunk=math.ceil(math.ceil(row_stride / tile_columns) / parts) * tile_columns,
            A=factors,
            B=factors + rank * row_stride,
            P=slots,
            Q=slots + math.ceil(rows / tiles.strip.rows) * rank * row_stride,
            A_gram=grams,
            B_gram=grams + square,
            A_shares=shares,
            B_shares=shares + math.ceil(row_stride / tiles.block.width) * square,
        )
        places.append(place)
        factors = place.B + rank * column_stride
        slots = place.Q + place.chunks * rank * column_stride
        grams += 2 * square
        shares = place.B_shares + place.B_blocks(tiles) * square
    return Layout(tiles, tuple(places), factors, slots, shares, grams)


class Wave:
    """The device state of matrices that share a dtype and a padded rank, and the two launches that advance it a step.

    weights: each W (d×k) on the device, its rows padded with zeros to `aligned(k)`: see `padded_weight`.
    active: the matrices still running; `keep` drops the others from the work lists.
    """

    def __init__(
        self,
        layout: Layout,
        problems: Sequence[Problem],
        weights: Sequence[Tensor],
        schedule: Schedule,
        steps: int,
    ) -> None:
        device = weights[0].device
        self.layout = layout
        self.weights = list(weights)

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.float32, device=device)

        self.factors, self.means, self.squares = (zeros(layout.factors) for _ in range(3))
        self.slots, self.shares, self.grams = zeros(layout.slots), zeros(layout.shares), zeros(layout.grams)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.rates = rate_table(schedule, steps).to(device)
        self.epsilons = torch.tensor(
            [schedule.eps_for((place.rows, place.columns)) for place in layout.places], dtype=torch.float32
        ).to(device)
        self.betas = (schedule.beta1, schedule.beta2, 1 - schedule.beta1, 1 - schedule.beta2)
        self.exponents = [
            _half_exponent(W, problem) if W.dtype == torch.float16 else 0
            for W, problem in zip(weights, problems, strict=True)
        ]
        square = (layout.tiles.rank, layout.tiles.rank)
        for place, problem in zip(layout.places, problems, strict=True):
            A, B = self._views(place)
            A.copy_(problem.A)
            B.copy_(problem.B)
            rank = place.rank
            # The first step's Gram matrices come in as a single share each; the other shares are zero.
            A_share = self.shares[place.A_shares :][: square[0] * square[1]].view(square)
            B_share = self.shares[place.B_shares :][: square[0] * square[1]].view(square)
            A_share[:rank, :rank] = (A.double() @ A.double().T).float()
            B_share[:rank, :rank] = (B.double().T @ B.double()).float()
        self.keep(range(len(layout.places)))

    def _views(self, place: Place) -> tuple[Tensor, Tensor]:
        A = self.factors[place.A :][: place.rank * place.row_stride].view(place.rank, place.row_stride)
        B = self.factors[place.B :][: place.rank * place.column_stride].view(place.rank, place.column_stride)
        return A[:, : place.columns], B[:, : place.rows].T

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """A (r×k) and B (d×r) of one matrix: views of the device's state."""
        return self._views(self.layout.places[index])

    def weight(self, index: int) -> Tensor:
        """W (d×k) of one matrix, without its padding."""
        return self.weights[index][:, : self.layout.places[index].columns]

    def keep(self, active: Sequence[int]) -> None:
        """Write the work lists for these matrices alone."""
        self.active = tuple(active)
        device = self.factors.device
        strips: list[list[int]] = []
        sums: list[list[int]] = []
        blocks: list[list[int]] = []
        for index in self.active:
            strips += self._strip_work(index)
            sums += self._sum_work(index)
            blocks += self._block_work(index)
        self.strips = torch.tensor(strips, dtype=torch.int64).to(device)
        self.sums = torch.tensor(sums, dtype=torch.int64).to(device)
        self.blocks = torch.tensor(blocks, dtype=torch.int64).to(device)

    def _strip_work(self, index: int) -> list[list[int]]:
        place, tiles, W = self.layout.places[index], self.layout.tiles, self.weights[index]
        # Offsets count from the first matrix, wherever the allocator put each.
        origin = (W.data_ptr() - self.weights[0].data_ptr()) // W.element_size()
        rows = tiles.strip.rows
        return [
            [
                origin + strip * rows * place.row_stride,
                place.row_stride,
                min(rows, place.rows - strip * rows),
                chunk * place.chunk,
                min((chunk + 1) * place.chunk, place.row_stride),
                place.A,
                place.B + strip * rows,
                place.column_stride,
                place.P + strip * place.rank * place.row_stride,
                place.Q + chunk * place.rank * place.column_stride + strip * rows,
                place.rank,
                self.exponents[index],
            ]
            for strip in range(place.strips(tiles))
            for chunk in range(place.chunks)
        ]

    def _sum_work(self, index: int) -> list[list[int]]:
        place, tiles = self.layout.places[index], self.layout.tiles
        return [
            [shares, blocks, gram, first]
            for shares, blocks, gram in (
                (place.A_shares, place.A_blocks(tiles), place.A_gram),
                (place.B_shares, place.B_blocks(tiles), place.B_gram),
            )
            for first in range(0, tiles.rank * tiles.rank, tiles.sum_block)
        ]

    def _block_work(self, index: int) -> list[list[int]]:
        place, tiles = self.layout.places[index], self.layout.tiles
        width, square = tiles.block.width, tiles.rank * tiles.rank
        A_side = (place.A, place.row_stride, place.P, place.strips(tiles), place.B_gram, place.A_shares)
        B_side = (place.B, place.column_stride, place.Q, place.chunks, place.A_gram, place.B_shares)
        return [
            [
                factor,
                stride,
                block * width,
                place.rank,
                slots,
                slot_count,
                place.rank * stride,
                gram,
                shares + block * square,
                index,
            ]
            for factor, stride, slots, slot_count, gram, shares in (A_side, B_side)
            for block in range(math.ceil(stride / width))
        ]

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
            self.weights[0],
            self.factors,
            self.slots,
            self.shares,
            self.grams,
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
            SPLIT=self.weights[0].dtype != torch.float32,
            PRECISION=tiles.precision,
            PREFETCH=strip.stages == 1,
            INTERPRETED=self.factors.device.type == "cpu",
            STRIP_FIELDS=STRIP_FIELDS,
            SUM_FIELDS=SUM_FIELDS,
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
            BLOCK_FIELDS=BLOCK_FIELDS,
            num_warps=block.warps,
            num_stages=1,
            enable_fp_fusion=True,
            **dict(tiles.options),
        )


def padded_weight(W: Tensor, device: torch.device) -> Tensor:
    """W (d×k) on the device, its rows padded with zeros to `aligned(k)`."""
    padded = torch.zeros(W.shape[0], aligned(W.shape[1]), dtype=W.dtype, device=device)
    padded[:, : W.shape[1]].copy_(W)
    return padded


def rate_table(schedule: Schedule, steps: int) -> Tensor:
    """lr/(1−β₁ⁱ⁺¹) and 1/(1−β₂ⁱ⁺¹) of every step i, computed in float64, float32 (steps, 2)."""
    rates = [
        (
            schedule.learning_rate(step) / (1 - schedule.beta1 ** (step + 1)),
            1 / (1 - schedule.beta2 ** (step + 1)),
        )
        for step in range(steps)
    ]
    return torch.tensor(rates, dtype=torch.float64).reshape(-1, 2).float()


def _half_exponent(W: Tensor, problem: Problem) -> int:
    """The power of two by which float16 halves of this matrix's factors are multiplied.

    Balanced factors of W have no entry above √||W||; the start may be wider. The bound goes FLOAT16_HEADROOM powers
    below overflow, which leaves the low halves 2²⁴ times finer than the largest entries.
    """
    bound = max(
        math.sqrt(float(torch.linalg.vector_norm(W, dtype=torch.float32))),
        float(problem.A.abs().max()),
        float(problem.B.abs().max()),
        2.0**-30,
    )
    return max(-40, min(40, 16 - FLOAT16_HEADROOM - math.ceil(math.log2(bound))))
