"""XWᵀ and XWᵀW from one pass over W on the CPU: a part of W comes from memory once, and a second time from the cache.

W lies in the checkpoint's own dtype and place, its rows (or, where W is a transposed view, its columns) contiguous;
X and the products are float32 or float64. Both kernels are made of in_place.py's inner and outer products, with four
columns of X, whose sums stay in registers; a first product in float64 of widened.py's. The sums over parts of W are
kept in slots that depend on the shape alone, so any number of threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import ceil, lcm
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...memory import empty, returned
from ..rounding import round_up
from ..threads import share
from .in_place import FETCHES, FILLS_VECTORS, WIDE_LANES, WIDE_ROWS, WIDE_VECTORS, inner_runs, outer_runs
from .jit import ZERO, njit
from .plain_products import add_inner_plain, add_outer_plain
from .simd import AMD, CACHE_LINE, LANES, LOADS_FLOAT16, kernel_view
from .widened import ACROSS, along_columns, along_rows, lines_of

MOST_SLOTS = 12
# Whether the second product of a strip of rows of W fetches the next strip: a pass is a third faster then on a Zen 4,
# and a fifth to a half slower on a Cascade Lake.
_FETCHES_STRIPS = FETCHES and AMD
# A strip of rows of W, and what of the next one is already fetched, stay in a core's second cache between the two
# products; where nothing is, half of that is faster. Of a tile of W's columns, all rows stay in the third. Few columns,
# or parts, would be slower.
_STRIP_BYTES, _TILE_BYTES = 3 << (17 if _FETCHES_STRIPS else 16), 6 << 20
_LEAST_COLUMNS, _MOST_COLUMNS = 288, 960
# Rows of W at a time for the first product alone.
_PART_ROWS = 96
# So much of the second product's sums stays in a second cache beside a strip.
_SUMS_BYTES = 1 << 17
# One slot per this many elements, up to MOST_SLOTS.
_SLOT_ELEMENTS = 1 << 19
# Columns of X in a loop, and rows of W.
BLOCK = 4
# Rows of W that fill the blocks of both products, and columns that fill those of one.
_WHOLE_ROWS, RUN = lcm(BLOCK, WIDE_ROWS), LANES * WIDE_VECTORS
# As many rows of W as make up for reading and writing the sums once more.
_OUTER_ROWS = 24
# Below this a second thread costs more than it saves.
_FLOPS_A_THREAD = 1e7
# Rows a multiple of so many bytes apart begin on an eighth of a first cache's sets of lines or fewer.
_CROWDED_BYTES = 512
# Whether a copy of W whose rows lie otherwise is worth its time: on a Zen 3 a call takes 3 to 8 % less then, on a
# Cascade Lake, which has more registers, up to a tenth more.
SPREADS = AMD or not FETCHES
# A thread copies so many at a time.
_COPIED_BYTES = 1 << 20


def takes(W: Tensor, dtype: torch.dtype) -> bool:
    """Whether these kernels can read W (d×k, d ≥ k) as it lies, for products in this dtype."""
    dtypes = [torch.float32, torch.bfloat16]
    dtypes += [torch.float16] if LOADS_FLOAT16 else []
    dtypes += [torch.float64] if dtype == torch.float64 else []
    return W.device.type == "cpu" and W.dtype in dtypes and 1 in W.stride() and min(W.shape) >= 2 * BLOCK


def for_one_thread(W: Tensor, width: int) -> bool:
    """Whether a pass over W with so many columns is worth a single thread only."""
    return W.numel() < 2 * _SLOT_ELEMENTS or 4 * W.numel() * round_up(width, BLOCK) < 2 * _FLOPS_A_THREAD


def crowded(W: Tensor) -> bool:
    """Whether W's rows (its columns, where those are contiguous) fall on so few lines of the first cache that they push
    each other out before they are done with.
    """
    return max(W.stride()) * W.element_size() % _CROWDED_BYTES == 0


def spread(W: Tensor, threads: int = 1) -> Tensor:
    """A copy of W, laid out alike but for its rows (columns), which are a cache line further apart.

    >>> spread(torch.eye(2, 128)).stride()
    (144, 1)
    """
    by_rows = W.stride(1) == 1
    rows = W if by_rows else W.T
    copy = empty((rows.shape[0], rows.shape[1] + CACHE_LINE // W.element_size()), W.dtype)[:, : rows.shape[1]]

    def fill(parts: Iterator[slice]) -> None:
        for part in parts:
            copy[part] = rows[part]

    step = max(1, _COPIED_BYTES // (rows.shape[1] * W.element_size()))
    parts = [slice(first, first + step) for first in range(0, len(rows), step)]
    share(fill, parts, min(threads, len(parts)))
    return copy if by_rows else copy.T


class FusedGramReaders:
    """A `FusedGramReader` for X of any width, one made for each width that is asked for."""

    def __init__(self, W: Tensor, threads: int, dtype: torch.dtype = torch.float32) -> None:
        self._W, self._threads, self._dtype = W, threads, dtype
        self._by_width: dict[int, FusedGramReader] = {}

    def of(self, width: int) -> FusedGramReader:
        """The reader for X of this many rows."""
        if width not in self._by_width:
            self._by_width[width] = FusedGramReader(self._W, width, self._threads, self._dtype)
        return self._by_width[width]

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(len(X))(X)


class FusedGramReader:
    """X ↦ XWᵀ (b×d) and XWᵀW (b×k), float32 or float64, for any X (b×k) of one width b, in work space of its own.

    threads: on how many its parts can be shared, at most, and no more than W's size is worth. image: the
        dtype of the second product, where it is not the first one's: float32 beside float64, but for a float64 W.

    >>> Y, Z = FusedGramReader(2 * torch.eye(48), width=1, threads=1)(torch.ones(1, 48))
    >>> float(Y[0, 0]), float(Z[0, 0])
    (2.0, 4.0)
    """

    def __init__(
        self,
        W: Tensor,
        width: int,
        threads: int,
        dtype: torch.dtype = torch.float32,
        image: torch.dtype | None = None,
    ) -> None:
        self._by_rows, self._width = W.stride(1) == 1, width
        self._flat, self._stride, self._shape = stored(W)
        m, n = self._shape
        b = round_up(width, BLOCK)
        wanted = max(1, min(MOST_SLOTS, m * n // _SLOT_ELEMENTS))
        if self._by_rows:
            self._step = max(1, _STRIP_BYTES // (n * W.element_size()) // _WHOLE_ROWS) * _WHOLE_ROWS
            self._parts = ceil(m / self._step)
        else:
            columns = min(_MOST_COLUMNS, n // wanted, _TILE_BYTES // (m * W.element_size()))
            self._step = max(_LEAST_COLUMNS, columns) // RUN * RUN
            self._parts = ceil(n / self._step)
        self._parts_a_slot = ceil(self._parts / wanted)
        slots = ceil(self._parts / self._parts_a_slot)
        worth = 1 if for_one_thread(W, width) else int(4 * m * n * b / _FLOPS_A_THREAD)
        self.threads = max(1, min(threads, slots, worth))
        kind = np.float64 if dtype == torch.float64 else np.float32
        second = np.float32 if image == torch.float32 and W.dtype != torch.float64 else kind
        # Rows a power of two apart would push each other, and W's rows, out of the first cache.
        across, down = (b, n + CACHE_LINE // np.dtype(kind).itemsize), (m, b)
        once, twice = (down, across) if self._by_rows else (across, down)
        by_entries = n if self._by_rows else m, *lines_of(b)
        self._given: NDArray[Any] = np.zeros(by_entries if dtype == torch.float64 else twice, kind)
        self._once: NDArray[Any] = np.empty(once, kind)
        # XWᵀ as the second product takes it.
        self._rounded: NDArray[Any] = self._once if second == kind else np.empty(self._once.shape, second)
        self._twice: NDArray[Any] = np.empty((slots, *twice), second)

    @property
    def compiled(self) -> tuple[NDArray[np.generic], tuple[int, ...], tuple[NDArray[np.float32], ...]]:
        """W's memory, its layout and the work space, as expansion.py takes them."""
        layout = (int(self._by_rows), self._stride, *self._shape, self._step, self._parts, self._parts_a_slot)
        return self._flat, layout, (self._given, self._once, self._twice)

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        by_entries = self._given.reshape(len(self._given), -1).T
        given = self._given if self._by_rows and self._given.ndim == 2 else by_entries
        once = self._once.T if self._by_rows else self._once
        (m, n), b = self._shape, self._width
        d, k = (m, n) if self._by_rows else (n, m)
        given[:b, :k] = X.numpy()
        share(self._read, range(len(self._twice)), self.threads)
        # One after the other, as expansion.py does.
        total = reduce(np.add, self._twice)
        twice = total if self._by_rows else total.T
        return _in_torchs_memory(once[:b, :d]), _in_torchs_memory(twice[:b, :k])

    def _read(self, slots: Iterator[int]) -> None:
        m, n = self._shape
        for slot in slots:
            first = slot * self._parts_a_slot
            last = min(first + self._parts_a_slot, self._parts)
            given, once, twice = self._given, self._once, self._twice[slot]
            shared = self._flat, self._stride, m, n, given, once, self._rounded, twice, self._step
            if self._by_rows:
                row_strips(*shared, first, last)
            else:
                column_tiles(*shared, first, last)


def wide_product(W: Tensor, X: Tensor, threads: int) -> Tensor:
    """XWᵀ (s×d) in float64, for X (s×k) in float64: the first product alone. The same bits for any number of threads.

    >>> wide_product(2 * torch.eye(48), torch.ones(1, 48).double(), threads=1)[0, :2]
    tensor([2., 2.], dtype=torch.float64)
    """
    flat, stride, (m, n) = stored(W)
    by_rows, s = W.stride(1) == 1, len(X)
    b = round_up(s, BLOCK)
    given = returned((W.shape[1], *lines_of(b)), torch.float64).zero_().numpy()
    given.reshape(len(given), -1)[:, :s] = X.T.numpy()
    Y = returned((m, b) if by_rows else (b, n), torch.float64).numpy()

    def multiply(parts: Iterator[slice]) -> None:
        for part in parts:
            if by_rows:
                along_rows(flat, stride, part.start, part.stop, n, given, Y)
            else:
                along_columns(flat, stride, m, part.start, part.stop, given, Y)

    step = _PART_ROWS if by_rows else ACROSS
    parts = [slice(first, min(first + step, W.shape[0])) for first in range(0, W.shape[0], step)]
    share(multiply, parts, min(threads, len(parts)))
    return _in_torchs_memory((Y.T if by_rows else Y)[:s])


def _in_torchs_memory(rows: NDArray[Any]) -> Tensor:
    """A copy: what torch makes of numbers may depend on where in a cache line they begin."""
    given = torch.from_numpy(rows)
    return returned(rows.shape, given.dtype).copy_(given)


@njit(cache=True, nogil=True)
def add_inner_products(
    W: Any, stride: int, top: int, bottom: int, left: int, count: int, X: Any, out: Any, ahead: int
) -> None:  # fmt: skip
    """out[i, c] += Σ_j W[i, left + j]·X[c, left + j] for rows [top, bottom) of W and all c.

    Entries of W that lie `ahead` further are brought into the second cache.
    """
    lanes = _vector_of(X)
    runs = count // lanes
    blocks = top + (bottom - top) // WIDE_ROWS * WIDE_ROWS if runs else top
    b, n = X.shape
    X_flat, out_flat = X.reshape(-1), out.reshape(-1)
    for i in range(top, blocks, WIDE_ROWS):
        for column in range(0, b, BLOCK):
            inner_runs(
                out_flat, i * b + column, b, W, i * stride + left, stride, X_flat, column * n + left, n, runs, ahead
            )
    add_inner_plain(W, stride, top, blocks, left + runs * lanes, count - runs * lanes, X, out)
    add_inner_plain(W, stride, blocks, bottom, left, count, X, out)


@njit(cache=True, nogil=True)
def add_outer_products(
    W: Any, stride: int, top: int, bottom: int, left: int, count: int, X: Any, out: Any, ahead: int
) -> None:  # fmt: skip
    """out[c, left + j] += Σ_i X[i, c]·W[i, left + j] for rows [top, bottom) of W and all c. ahead: as above, or 0."""
    b, n = out.shape
    X_flat, out_flat = X.reshape(-1), out.reshape(-1)
    lanes = _vector_of(out)
    run = lanes * WIDE_VECTORS
    whole, runs = left + count // run * run, left + count // lanes * lanes
    for j in range(left, whole, run):
        for column in range(0, b, BLOCK):
            outer_runs(
                out_flat, column * n + j, n, X_flat, top * b + column, b, W, top * stride + j, stride, bottom - top,
                ahead, WIDE_VECTORS,
            )  # fmt: skip
    for j in range(whole, runs, lanes):
        for column in range(0, b, BLOCK):
            outer_runs(
                out_flat, column * n + j, n, X_flat, top * b + column, b, W, top * stride + j, stride, bottom - top,
                ahead, 1,
            )  # fmt: skip
    add_outer_plain(W, stride, top, bottom, runs, left + count - runs, X, out)


@njit(cache=True, nogil=True)
def _vector_of(sums: Any) -> int:
    """How many sums of an array's dtype make a vector; more than there are columns where plain loops are faster."""
    if sums.itemsize == 4:
        return LANES
    return WIDE_LANES if FILLS_VECTORS else 1 << 40


@njit(cache=True, nogil=True)
def add_outer_by_strips(W: Any, stride: int, m: int, left: int, count: int, X: Any, out: Any) -> None:
    """`add_outer_products` for all m rows of W, so few at a time that they are read almost as they lie in memory."""
    for top in range(0, m, _OUTER_ROWS):
        add_outer_products(W, stride, top, min(top + _OUTER_ROWS, m), left, count, X, out, _OUTER_ROWS * stride)


@njit(cache=True, nogil=True)
def row_strips(
    W: Any, stride: int, m: int, n: int, X: Any, Y: Any, rounded: Any, Z: Any, strip: int, first: int, last: int
) -> None:  # fmt: skip
    """Y = WXᵀ for strips [first, last) of `strip` rows of the m×n matrix W, and Z = Σ YᵀW over them.

    Z: (b, n). Y: (m, b). X: (b, n), or as `along_rows` takes it. rounded: Y itself or, where Z has another dtype, room
    for Y in that. b: a multiple of 4. Reads a strip of W from memory once and again from the second cache; reads X, and
    reads and writes Z, once for a few rows, from the caches.
    """
    ahead = strip * stride if _FETCHES_STRIPS else ZERO
    run = max(RUN, _SUMS_BYTES // (len(Z) * Z.itemsize) // RUN * RUN)
    Z[:] = 0
    for part in range(first, last):
        top, bottom = part * strip, min((part + 1) * strip, m)
        if X.ndim == 3:
            along_rows(W, stride, top, bottom, n, X, Y)
        else:
            Y[top:bottom] = 0
            add_inner_products(W, stride, top, bottom, ZERO, n, X, Y, WIDE_ROWS * stride)
        if rounded.itemsize != Y.itemsize:
            for i in range(top, bottom):
                for c in range(Y.shape[1]):
                    rounded[i, c] = Y[i, c]
        for left in range(ZERO, n, run):
            add_outer_products(W, stride, top, bottom, left, min(run, n - left), rounded, Z, ahead)


@njit(cache=True, nogil=True)
def column_tiles(
    W: Any, stride: int, m: int, n: int, X: Any, Y: Any, rounded: Any, Z: Any, tile: int, first: int, last: int
) -> None:  # fmt: skip
    """Y = XᵀW for tiles [first, last) of `tile` columns of the m×n matrix W, and Z = Σ WYᵀ over them.

    X, Z: (m, b), or X as `along_columns` takes it. Y: (b, n). rounded: as for `row_strips`. b: a multiple of 4. Reads a
    tile of W from memory once and again from the second cache; reads X, and reads and writes Z, once a tile.
    """
    Z[:] = 0
    for part in range(first, last):
        left = part * tile
        count = min(tile, n - left)
        if X.ndim == 3:
            along_columns(W, stride, m, left, left + count, X, Y)
        else:
            Y[:, left : left + count] = 0
            add_outer_by_strips(W, stride, m, left, count, X, Y)
        if rounded.itemsize != Y.itemsize:
            for c in range(len(Y)):
                for j in range(left, left + count):
                    rounded[c, j] = Y[c, j]
        add_inner_products(W, stride, ZERO, m, left, count, rounded, Z, WIDE_ROWS * stride)


def stored(W: Tensor) -> tuple[NDArray[np.generic], int, tuple[int, int]]:
    """The memory of W, one of whose strides is 1: of its rows, or of its columns; how far they are apart; the shape."""
    stored = W if W.stride(1) == 1 else W.T
    m, n = stored.shape
    stride = stored.stride(0)
    return kernel_view(stored.as_strided(((m - 1) * stride + n,), (1,))), stride, (m, n)
