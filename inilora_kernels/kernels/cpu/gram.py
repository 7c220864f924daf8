"""XWᵀ and XWᵀW from one reading of W on the CPU: a part of W is packed once and multiplied twice while in cache.

Layouts (float32 but for W; padding is zero):

    W       in the checkpoint's own dtype and place, its rows (or, where W is a transposed view, its columns) contiguous
    packed  a thread's copy of the part of W at hand, in panels of PANEL columns of the stored matrix
    along the stored rows     (length rounded up, b)
    along the stored columns  (panels, b, PANEL)

b is X's number of rows rounded up to the rank group. The sums over parts of W are kept in slots that the shape alone
decides on, so any number of threads gives the same bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rounding import round_up
from .jit import njit
from .simd import (
    GROUP,
    LANES,
    LOADS_FLOAT16,
    PANEL,
    ROWS,
    SMALL_GROUP,
    VECTORS,
    copy_runs,
    inner_products,
    kernel_view,
    outer_products,
)

MOST_SLOTS = 12
# A packed part of W is about so large: it stays in a core's second cache, beside the blocks that it meets.
PACKED_BYTES = 1 << 18
# A strip has a multiple of so many rows, and at most so many, where X's traffic is small beside W's.
_ROW_STEP, _MOST_ROWS = 6, 96
_TILE_PANELS = 8
# Below this a second thread costs more than it saves.
_FLOPS_A_THREAD = 1e7


def takes(W: Tensor) -> bool:
    """Whether these kernels can read W (d×k, d ≥ k) as it lies."""
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if LOADS_FLOAT16 else [])]
    return W.device.type == "cpu" and W.dtype in dtypes and 1 in W.stride() and min(W.shape) >= PANEL


class FusedGramReader:
    """X ↦ XWᵀ (b×d) and XWᵀW (b×k), float32, for any X (b×k) of one width b. Holds the work space that it needs.

    >>> Y, Z = FusedGramReader(2 * torch.eye(48), width=1, threads=1)(torch.ones(1, 48))
    >>> float(Y[0, 0]), float(Z[0, 0])
    (2.0, 4.0)
    """

    def __init__(self, W: Tensor, width: int, threads: int) -> None:
        self._by_rows = W.stride(1) == 1
        stored = W if self._by_rows else W.T
        self._shape, self._width = stored.shape, width
        self._stride = stored.stride(0)
        m, n = stored.shape
        self._flat = kernel_view(stored.as_strided(((m - 1) * self._stride + n,), (1,)))
        b = round_up(width, SMALL_GROUP)
        panels = ceil(n / PANEL)
        row_bytes = PANEL * W.element_size()
        if self._by_rows:
            rows = PACKED_BYTES // (panels * row_bytes) // _ROW_STEP * _ROW_STEP
            self._step = min(max(_ROW_STEP, rows), _MOST_ROWS)
            self._parts, self._packed = ceil(m / self._step), panels * PANEL * self._step
            along_rows = self._parts * self._step
        else:
            along_rows = round_up(m, ROWS)
            self._step = min(panels, _TILE_PANELS, max(1, PACKED_BYTES // (along_rows * row_bytes)))
            self._parts, self._packed = ceil(panels / self._step), self._step * PANEL * along_rows
        self._parts_a_slot = ceil(self._parts / MOST_SLOTS)
        slots = ceil(self._parts / self._parts_a_slot)
        self._threads = max(1, min(threads, slots, int(4 * m * n * b / _FLOPS_A_THREAD)))
        self._pool = ThreadPoolExecutor(self._threads)
        in_panels, in_rows = (panels, b, PANEL), (along_rows, b)
        self._given = torch.zeros(in_panels if self._by_rows else in_rows)
        self._once = torch.empty(in_rows if self._by_rows else in_panels)
        self._twice = torch.empty(slots, *self._given.shape)
        self._work = [np.zeros(self._packed, self._flat.dtype) for _ in range(self._threads)]

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        m, n = self._shape
        if self._by_rows:
            _fill_panels(self._given, X)
        else:
            self._given[:m, : self._width] = X.T
        if self._threads == 1:
            self._read(0)
        else:
            list(self._pool.map(self._read, range(self._threads)))
        total = self._twice.sum(0)
        along_rows, in_panels = (self._once, total) if self._by_rows else (total, self._once)
        found = along_rows[:m, : self._width].T.contiguous(), _from_panels(in_panels)[: self._width, :n]
        return found if self._by_rows else (found[1], found[0])

    def _read(self, member: int) -> None:
        slots = len(self._twice)
        m, n = self._shape
        kernel = row_strips if self._by_rows else column_panels
        for slot in range(slots * member // self._threads, slots * (member + 1) // self._threads):
            first = slot * self._parts_a_slot
            kernel(
                self._flat, self._stride, m, n, self._given.numpy(), self._once.numpy(),
                self._twice[slot].numpy(), self._work[member], self._step, first,
                min(first + self._parts_a_slot, self._parts),
            )  # fmt: skip


def _fill_panels(panels: Tensor, rows: Tensor) -> None:
    """Rows (b×n) into the panels (n/PANEL rounded up, b rounded up, PANEL) that they fit."""
    width, n = rows.shape
    whole = n // PANEL
    panels[:whole, :width] = rows[:, : whole * PANEL].reshape(width, whole, PANEL).transpose(0, 1)
    if whole < len(panels):
        panels[whole, :width, : n - whole * PANEL] = rows[:, whole * PANEL :]


def _from_panels(panels: Tensor) -> Tensor:
    return panels.transpose(0, 1).reshape(panels.shape[1], -1)


@njit(cache=True, nogil=True, inline="always")
def _pack(
    W: Any, stride: int, row: int, rows: int, columns: int, left: int, right: int, packed: Any, tile: int
) -> None:
    """Copy panels [left, right) of `rows` stored rows to packed[panel·tile + i·PANEL …], panel counted from `left`."""
    whole = min(right, columns // PANEL)
    for i in range(rows):
        at = (row + i) * stride
        copy_runs(packed, i * PANEL, tile, W, at + left * PANEL, PANEL, whole - left, LANES, VECTORS)
        if whole < right:
            to = (whole - left) * tile + i * PANEL
            packed[to : to + PANEL] = 0
            for j in range(whole * PANEL, columns):
                packed[to + j - whole * PANEL] = W[at + j]


@njit(cache=True, nogil=True)
def row_strips(
    W: Any, stride: int, m: int, n: int, A: Any, Q: Any, P: Any, packed: Any, strip_rows: int, first: int, last: int,
) -> None:  # fmt: skip
    """Q = W·Aᵀ for strips [first, last) of the m×n matrix W, and P = Σ QᵀW over them.

    A, P: (panels, b, PANEL). Q: (rows, b). packed: (panels, strip_rows, PANEL), whose size the caller fits to a core's
    cache. Reads W once from memory and writes it to `packed`, which the products read b/GROUP times each; reads A and
    reads and writes P once a strip.
    """
    n_panels, b = A.shape[0], A.shape[1]
    A_flat, Q_flat, P_flat = A.reshape(-1), Q.reshape(-1), P.reshape(-1)
    tile = strip_rows * PANEL
    P_flat[:] = 0
    for strip in range(first, last):
        row = strip * strip_rows
        rows = min(strip_rows, m - row)
        Q_flat[row * b : (row + strip_rows) * b] = 0
        if rows < strip_rows:
            packed[:] = 0
        _pack(W, stride, row, rows, n, 0, n_panels, packed, tile)
        for left in range(0, n_panels, _TILE_PANELS):
            right = min(left + _TILE_PANELS, n_panels)
            for i in range(0, strip_rows, ROWS):
                for p in range(0, b, GROUP):
                    Q_at, W_at, A_at = (row + i) * b + p, left * tile + i * PANEL, (left * b + p) * PANEL
                    if b - p >= GROUP:
                        inner_products(
                            Q_flat, Q_at, b, packed, W_at, tile, A_flat, A_at, b * PANEL, right - left, ROWS, GROUP
                        )
                    else:
                        inner_products(
                            Q_flat, Q_at, b, packed, W_at, tile, A_flat, A_at, b * PANEL, right - left, ROWS,
                            SMALL_GROUP,
                        )  # fmt: skip
        for panel in range(n_panels):
            for p in range(0, b, GROUP):
                P_at = (panel * b + p) * PANEL
                if b - p >= GROUP:
                    outer_products(
                        P_flat, P_at, PANEL, Q_flat, row * b + p, b, 1, packed, panel * tile, PANEL, rows, GROUP,
                        LANES, VECTORS,
                    )  # fmt: skip
                else:
                    outer_products(
                        P_flat, P_at, PANEL, Q_flat, row * b + p, b, 1, packed, panel * tile, PANEL, rows,
                        SMALL_GROUP, LANES, VECTORS,
                    )  # fmt: skip


@njit(cache=True, nogil=True)
def column_panels(
    W: Any, stride: int, m: int, n: int, X: Any, P: Any, Q: Any, packed: Any, group: int, first: int, last: int,
) -> None:  # fmt: skip
    """P = (WᵀX)ᵀ for groups [first, last) of `group` panels of the m×n matrix W, and Q = Σ W·Pᵀ over them.

    X, Q: (m rounded up, b). P: (panels, b, PANEL). packed: (group, m rounded up, PANEL), whose size the caller fits to
    a core's cache. Reads W once from memory and writes it to `packed`, which the products read b/GROUP times each;
    reads X and reads and writes Q once a group.
    """
    n_panels, b, m_padded = P.shape[0], P.shape[1], X.shape[0]
    X_flat, P_flat, Q_flat = X.reshape(-1), P.reshape(-1), Q.reshape(-1)
    tile = m_padded * PANEL
    Q_flat[:] = 0
    for left in range(first * group, min(last * group, n_panels), group):
        right = min(left + group, n_panels)
        P_flat[left * b * PANEL : right * b * PANEL] = 0
        _pack(W, stride, 0, m, n, left, right, packed, tile)
        for panel in range(left, right):
            for p in range(0, b, GROUP):
                P_at, W_at = (panel * b + p) * PANEL, (panel - left) * tile
                if b - p >= GROUP:
                    outer_products(P_flat, P_at, PANEL, X_flat, p, b, 1, packed, W_at, PANEL, m, GROUP, LANES, VECTORS)
                else:
                    outer_products(
                        P_flat, P_at, PANEL, X_flat, p, b, 1, packed, W_at, PANEL, m, SMALL_GROUP, LANES, VECTORS
                    )
        for i in range(0, m_padded, ROWS):
            for p in range(0, b, GROUP):
                Q_at, P_at = i * b + p, (left * b + p) * PANEL
                if b - p >= GROUP:
                    inner_products(
                        Q_flat, Q_at, b, packed, i * PANEL, tile, P_flat, P_at, b * PANEL, right - left, ROWS, GROUP
                    )
                else:
                    inner_products(
                        Q_flat, Q_at, b, packed, i * PANEL, tile, P_flat, P_at, b * PANEL, right - left, ROWS,
                        SMALL_GROUP,
                    )  # fmt: skip
