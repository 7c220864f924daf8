"""Which matrices make a batch of the direct solver, and where they lie: arithmetic alone, without triton or a GPU.

Every W lies tall, d ≥ n, its rows padded to a multiple of 16 elements; a wide one is transposed when it arrives. So the
solver's vectors have an entry for each column. They lie in one dense tensor for all matrices, (BATCH, WIDTH, N), for
torch's batched algebra: N is n rounded up to a quarter of an octave, and missing matrices are zeros, so that the shapes
of that algebra, and with them its bits, follow from a matrix alone and not from its neighbours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np

from ..backend import WIDTH
from ..rounding import round_up
from .gpus import Gpu
from .layout import WorkList, weight_bytes
from .tiles import ALIGNMENT, GramTile, aligned, gram_tile

# Matrices whose dense algebra is one call.
BATCH = 16
# The last pass has so many float64 tensors of rows as long as W's sides, and so many rows beyond the rank: FEW_BEYOND
# of judgement.py, with which numba would be imported.
_LAST_PASS, _MOST_BEYOND = 5, 4


class GramField(IntEnum):
    """A program's row: OWNED rows (or columns) of one tall W, and how many of the other side it walks through."""

    W_OFFSET = 0
    STRIDE = 1
    OWNED = 2
    THROUGH = 3
    GIVEN_OFFSET = 4
    FOUND_OFFSET = 5
    MATRIX = 6


@dataclass(frozen=True)
class TallPlace:
    """One matrix: rows ≥ columns; W_offset, in elements. transposed: the stored W has rows and columns swapped."""

    rows: int
    columns: int
    stride: int
    W_offset: int
    transposed: bool


@dataclass(frozen=True)
class GramLayout:
    """A batch. N, D: rows of the dense tensors X, Z (BATCH, WIDTH, N) and Y (BATCH, WIDTH, D), in elements.

    groups: runs of matrices, first and last + 1, whose weights stay in the cache from one product to the next; a single
    run where they do not, or where that would leave the GPU idle.
    """

    places: tuple[TallPlace, ...]
    weights: int
    N: int
    D: int
    groups: tuple[tuple[int, int], ...]
    resident: bool
    tile: GramTile

    def work(self, *, along_rows: bool) -> tuple[WorkList, tuple[int, ...]]:
        """The programs' rows, matrix by matrix, and where those of each group begin, with the end as the last."""
        pieces, starts = [], [0]
        for first, last in self.groups:
            pieces += [self._of(index, along_rows) for index in range(first, last)]
            starts.append(sum(map(len, pieces)))
        return np.concatenate(pieces), tuple(starts)

    def _of(self, index: int, along_rows: bool) -> WorkList:
        place, own = self.places[index], self.tile.own
        size, through = (place.rows, place.columns) if along_rows else (place.columns, place.rows)
        start = np.arange(0, size, own, dtype=np.int64)
        work = np.empty((len(start), len(GramField)), np.int64)
        work[:, GramField.W_OFFSET] = place.W_offset + start * (place.stride if along_rows else 1)
        work[:, GramField.STRIDE] = place.stride
        work[:, GramField.OWNED] = np.minimum(own, size - start)
        work[:, GramField.THROUGH] = through
        given, found = (self.N, self.D) if along_rows else (self.D, self.N)
        work[:, GramField.GIVEN_OFFSET] = index * WIDTH * given
        work[:, GramField.FOUND_OFFSET] = index * WIDTH * found + start
        work[:, GramField.MATRIX] = index
        return work


def dense_length(n: int) -> int:
    """n rounded up to a quarter of an octave, at least to 64.

    >>> dense_length(1), dense_length(768), dense_length(4096), dense_length(4100)
    (64, 768, 4096, 5120)
    """
    return round_up(n, max(64, 2 ** (max(n - 1, 1).bit_length() - 3)))


def gram_layout(
    shapes: Sequence[tuple[int, int]], itemsize: int, tile: GramTile, cache: float, programs: int = 1
) -> GramLayout:
    """Give each matrix of a batch its place, in order. cache: bytes of weights that stay there between two products.

    programs: how many keep the GPU busy. Groups with fewer in a launch take longer than reading all from memory twice:
    16 of 1024×4096, three a group, took 295 µs a pass on an H200, and 90 as a single run.
    """
    places, offset = [], 0
    for d, k in shapes:
        rows, columns = max(d, k), min(d, k)
        places.append(TallPlace(rows, columns, aligned(columns), offset, transposed=d < k))
        offset += round_up(rows * aligned(columns), ALIGNMENT)
    sizes = [weight_bytes((place.rows, place.columns), itemsize) for place in places]
    groups = _groups(sizes, cache)
    # The columns are the shorter side, and the last group may be what is left over.
    fewest = min(
        (sum(math.ceil(place.columns / tile.own) for place in places[first:last]) for first, last in groups[:-1]),
        default=programs,
    )
    resident = max(sizes) <= cache and fewest >= programs
    return GramLayout(
        tuple(places),
        offset,
        max(dense_length(place.columns) for place in places),
        aligned(max(place.rows for place in places)),
        tuple(groups) if resident else ((0, len(places)),),
        resident,
        tile,
    )


def gram_layout_on(gpu: Gpu, shapes: Sequence[tuple[int, int]], itemsize: int) -> GramLayout:
    """The layout of a batch of these matrices on this GPU."""
    tile = gram_tile(gpu.architecture, itemsize)
    return gram_layout(shapes, itemsize, tile, cached_bytes(gpu), gpu.multiprocessors)


def _groups(sizes: Sequence[int], cache: float) -> list[tuple[int, int]]:
    """Runs of matrices that the cache holds together, a larger one alone."""
    starts, held = [0], 0.0
    for index, size in enumerate(sizes):
        if held and held + size > cache:
            starts.append(index)
            held = 0.0
        held += size
    return list(pairwise([*starts, len(sizes)]))


@dataclass(frozen=True)
class Wanted:
    """One matrix to decompose: W's shape (d, k), bytes of an element, rank, and how many basis vectors it may take."""

    shape: tuple[int, int]
    itemsize: int
    rank: int
    vectors: int

    @property
    def dense_bytes(self) -> int:
        """Of the basis, its matrix QMQᵀ and the last pass's, which any batch holds BATCH times, filled or not."""
        length = dense_length(min(self.shape))
        last = _LAST_PASS * 8 * (self.rank + _MOST_BEYOND) * max(length, *self.shape)
        return 4 * self.vectors * length + 8 * self.vectors**2 + last

    @property
    def bytes(self) -> int:
        """Of the weight."""
        return weight_bytes((max(self.shape), min(self.shape)), self.itemsize)


def batches(wanted: Sequence[Wanted], kinds: Sequence[Hashable], memory: float) -> list[tuple[int, ...]]:
    """Which matrices go together: of one kind (the weights' dtype), dense length, rank and number of vectors.

    At most BATCH, and at most `memory` bytes; a matrix that does not fit is in none of them. Larger ones first.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (one, kind) in enumerate(zip(wanted, kinds, strict=True)):
        groups[kind, dense_length(min(one.shape)), one.rank, one.vectors].append(index)
    found: list[tuple[int, ...]] = []
    for members in sorted(groups.values(), key=lambda members: -math.prod(wanted[members[0]].shape)):
        fixed = BATCH * wanted[members[0]].dense_bytes
        held, batch = float(fixed), list[int]()
        for index in members:
            size = wanted[index].bytes
            if fixed + size > memory:
                continue
            if batch and (len(batch) == BATCH or held + size > memory):
                found.append(tuple(batch))
                held, batch = float(fixed), []
            batch.append(index)
            held += size
        if batch:
            found.append(tuple(batch))
    return found


def cached_bytes(gpu: Gpu) -> float:
    """Bytes of weights that a batch may keep in the cache."""
    return gpu.cache * gpu.cache_usable
