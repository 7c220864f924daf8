"""Where everything of a wave is in memory: pure arithmetic, importable without triton or a GPU.

All state of a wave is in a few long buffers, and every program takes one row of a work list of int64: offsets into the
buffers, in elements, and sizes. The fields of those rows are defined here once, and the kernels read them by name.
The backend and the cost model take bytes and programs from here, so that a wave that does not fit is refused before
anything is allocated, and a prediction counts what will run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..rounding import round_up
from .tiles import ALIGNMENT, Tiles, aligned

WorkList = NDArray[np.int64]


class StripField(IntEnum):
    """A strip program's row: a strip of one W, from FIRST_COLUMN up to LAST_COLUMN. MATRIX: its index in the wave."""

    W_OFFSET = 0
    STRIDE = 1
    ROWS = 2
    FIRST_COLUMN = 3
    LAST_COLUMN = 4
    A_OFFSET = 5
    B_OFFSET = 6
    B_STRIDE = 7
    P_OFFSET = 8
    Q_OFFSET = 9
    RANK = 10
    MATRIX = 11


class SumField(IntEnum):
    """A sum program's row: COUNT shares of one Gram matrix, added up for the entries from FIRST_ENTRY on."""

    SHARES_OFFSET = 0
    COUNT = 1
    GRAM_OFFSET = 2
    FIRST_ENTRY = 3
    MATRIX = 4


class BlockField(IntEnum):
    """An Adam program's row: the columns from FIRST_COLUMN on of one factor X, its slots, and the Gram matrices."""

    X_OFFSET = 0
    STRIDE = 1
    FIRST_COLUMN = 2
    RANK = 3
    SLOTS_OFFSET = 4
    SLOT_COUNT = 5
    SLOT_SIZE = 6
    GRAM_OFFSET = 7
    SHARE_OFFSET = 8
    MATRIX = 9


@dataclass(frozen=True)
class Place:
    """Where one matrix's state is, as offsets in elements into the wave's buffers.

    rows, columns: d, k of W; row_stride, column_stride: k, d rounded up, the row lengths of A and Bᵀ.
    chunk: columns that one strip program takes. strips, chunks: strip programs, in each direction.
    """

    rows: int
    columns: int
    rank: int
    row_stride: int
    column_stride: int
    chunk: int
    strips: int
    chunks: int
    A_blocks: int
    B_blocks: int
    W_offset: int
    A_offset: int
    B_offset: int
    P_offset: int
    Q_offset: int
    A_gram_offset: int
    B_gram_offset: int
    A_shares_offset: int
    B_shares_offset: int


@dataclass(frozen=True)
class Layout:
    """The places of a wave's matrices and the sizes, in elements, of the buffers they lie in; all float32 but weights.

    Layouts of the same shapes, ranks, divisions and tiles are equal: such waves use the same buffers and graphs.
    """

    tiles: Tiles
    places: tuple[Place, ...]
    weights: int
    factors: int
    slots: int
    shares: int
    grams: int

    @property
    def strip_programs(self) -> int:
        return sum(place.strips * place.chunks for place in self.places)

    @property
    def state_bytes(self) -> int:
        """Device bytes besides the weights: factors and two moments, slots, Gram matrices and their shares."""
        return 4 * (3 * self.factors + self.slots + self.shares + self.grams)

    @property
    def work_bytes(self) -> int:
        """Device bytes of the work lists and of the losses' partial sums."""
        blocks = sum(place.A_blocks + place.B_blocks for place in self.places)
        sums = 2 * len(self.places) * math.ceil(self.tiles.rank**2 / self.tiles.sum_block)
        rows = self.strip_programs * (len(StripField) + 1), sums * len(SumField), blocks * len(BlockField)
        return 8 * sum(rows)

    def strip_work(self) -> WorkList:
        """The strip programs' rows, matrix by matrix, strip by strip."""
        return np.concatenate([self._strips_of(index) for index in range(len(self.places))])

    def _strips_of(self, index: int) -> WorkList:
        place, rows = self.places[index], self.tiles.strip.rows
        strip, chunk = (axis.ravel() for axis in np.mgrid[: place.strips, : place.chunks].astype(np.int64))
        work = np.empty((len(strip), len(StripField)), np.int64)
        work[:, StripField.W_OFFSET] = place.W_offset + strip * rows * place.row_stride
        work[:, StripField.STRIDE] = place.row_stride
        work[:, StripField.ROWS] = np.minimum(rows, place.rows - strip * rows)
        work[:, StripField.FIRST_COLUMN] = chunk * place.chunk
        work[:, StripField.LAST_COLUMN] = np.minimum((chunk + 1) * place.chunk, place.row_stride)
        work[:, StripField.A_OFFSET] = place.A_offset
        work[:, StripField.B_OFFSET] = place.B_offset + strip * rows
        work[:, StripField.B_STRIDE] = place.column_stride
        work[:, StripField.P_OFFSET] = place.P_offset + strip * place.rank * place.row_stride
        work[:, StripField.Q_OFFSET] = place.Q_offset + chunk * place.rank * place.column_stride + strip * rows
        work[:, StripField.RANK] = place.rank
        work[:, StripField.MATRIX] = index
        return work

    def sum_work(self) -> WorkList:
        """The sum programs' rows."""
        entries = range(0, self.tiles.rank**2, self.tiles.sum_block)
        rows = [
            (shares, count, gram, first, index)
            for index, place in enumerate(self.places)
            for shares, count, gram in (
                (place.A_shares_offset, place.A_blocks, place.A_gram_offset),
                (place.B_shares_offset, place.B_blocks, place.B_gram_offset),
            )
            for first in entries
        ]
        return np.array(rows, np.int64)

    def block_work(self) -> WorkList:
        """The Adam programs' rows: A's blocks and then Bᵀ's, matrix by matrix."""
        width, square = self.tiles.block.width, self.tiles.rank**2
        pieces = []
        for index, place in enumerate(self.places):
            for x, stride, slots, count, gram, shares, blocks in (
                (
                    place.A_offset, place.row_stride, place.P_offset, place.strips, place.B_gram_offset,
                    place.A_shares_offset, place.A_blocks,
                ),
                (
                    place.B_offset, place.column_stride, place.Q_offset, place.chunks, place.A_gram_offset,
                    place.B_shares_offset, place.B_blocks,
                ),
            ):  # fmt: skip
                block = np.arange(blocks, dtype=np.int64)
                work = np.empty((blocks, len(BlockField)), np.int64)
                work[:, BlockField.X_OFFSET] = x
                work[:, BlockField.STRIDE] = stride
                work[:, BlockField.FIRST_COLUMN] = block * width
                work[:, BlockField.RANK] = place.rank
                work[:, BlockField.SLOTS_OFFSET] = slots
                work[:, BlockField.SLOT_COUNT] = count
                work[:, BlockField.SLOT_SIZE] = place.rank * stride
                work[:, BlockField.GRAM_OFFSET] = gram
                work[:, BlockField.SHARE_OFFSET] = shares + block * square
                work[:, BlockField.MATRIX] = index
                pieces.append(work)
        return np.concatenate(pieces)


def idle(work: Sequence[WorkList], finished: Collection[int]) -> None:
    """Turn the rows of finished matrices into work that reads and writes nothing of W, so that the grid can stay.

    work: strips, sums and blocks, changed in place.
    """
    strips, sums, blocks = work
    done = np.isin(strips[:, StripField.MATRIX], list(finished))
    for field in (StripField.ROWS, StripField.RANK, StripField.FIRST_COLUMN, StripField.LAST_COLUMN):
        strips[done, field] = 0
    sums[np.isin(sums[:, SumField.MATRIX], list(finished)), SumField.COUNT] = 0
    done = np.isin(blocks[:, BlockField.MATRIX], list(finished))
    for column in (BlockField.RANK, BlockField.SLOT_COUNT):
        blocks[done, column] = 0


def weight_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Device bytes of a W (d×k) with its rows padded."""
    return shape[0] * aligned(shape[1]) * itemsize


def lay_out(shapes: Sequence[tuple[int, int]], ranks: Sequence[int], chunks: Sequence[int], tiles: Tiles) -> Layout:
    """Give each matrix its place, in order. chunks: into how many parts each matrix's columns are divided."""
    return _lay_out(tuple(shapes), tuple(ranks), tuple(chunks), tiles)


@lru_cache(maxsize=4096)
def _lay_out(
    shapes: tuple[tuple[int, int], ...], ranks: tuple[int, ...], chunks: tuple[int, ...], tiles: Tiles
) -> Layout:
    places = []
    weights = factors = slots = shares = grams = 0
    square, tile_columns = tiles.rank**2, tiles.strip.columns
    for (rows, columns), rank, parts in zip(shapes, ranks, chunks, strict=True):
        row_stride, column_stride = aligned(columns), aligned(rows)
        strips = math.ceil(rows / tiles.strip.rows)
        chunk = math.ceil(math.ceil(row_stride / tile_columns) / parts) * tile_columns
        A_blocks, B_blocks = (math.ceil(stride / tiles.block.width) for stride in (row_stride, column_stride))
        place = Place(
            rows=rows,
            columns=columns,
            rank=rank,
            row_stride=row_stride,
            column_stride=column_stride,
            chunk=chunk,
            strips=strips,
            chunks=math.ceil(row_stride / chunk),
            A_blocks=A_blocks,
            B_blocks=B_blocks,
            W_offset=weights,
            A_offset=factors,
            B_offset=factors + rank * row_stride,
            P_offset=slots,
            Q_offset=slots + strips * rank * row_stride,
            A_gram_offset=grams,
            B_gram_offset=grams + square,
            A_shares_offset=shares,
            B_shares_offset=shares + A_blocks * square,
        )
        places.append(place)
        weights += round_up(rows * row_stride, ALIGNMENT)
        factors = place.B_offset + rank * column_stride
        slots = place.Q_offset + place.chunks * rank * column_stride
        grams += 2 * square
        shares = place.B_shares_offset + B_blocks * square
    return Layout(tiles, tuple(places), weights, factors, slots, shares, grams)
