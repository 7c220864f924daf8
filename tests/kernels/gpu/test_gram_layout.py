"""Which matrices make a batch, and where they lie."""

from __future__ import annotations

import numpy as np

from inilora_kernels.kernels.gpu.gram_layout import BATCH, GramField, Wanted, batches, dense_length, gram_layout
from inilora_kernels.kernels.gpu.tiles import GramTile

TILE = GramTile(own=32, inner=64, warps=4, stages=1, precision="ieee")


def test_every_row_and_column_has_one_program() -> None:
    layout = gram_layout([(100, 40), (30, 70), (64, 64)], 2, TILE, cache=1e9)
    assert [place.transposed for place in layout.places] == [False, True, False]
    for along_rows in (True, False):
        work, starts = layout.work(along_rows=along_rows)
        assert starts == (0, len(work))
        for index, place in enumerate(layout.places):
            mine = work[work[:, GramField.MATRIX] == index]
            assert mine[:, GramField.OWNED].sum() == (place.rows if along_rows else place.columns)
            assert (mine[:, GramField.THROUGH] == (place.columns if along_rows else place.rows)).all()
            step = np.diff(mine[:, GramField.W_OFFSET])
            assert (step == (32 * place.stride if along_rows else 32)).all()


def test_a_group_fills_the_cache_and_one_that_streams_is_a_single_group() -> None:
    shapes = [(64, 64)] * 5  # of 8,192 bytes each
    assert gram_layout(shapes, 2, TILE, cache=17_000).groups == ((0, 2), (2, 4), (4, 5))
    streamed = gram_layout(shapes, 2, TILE, cache=8_000)
    assert streamed.groups == ((0, 5),)
    assert not streamed.resident


def test_groups_that_would_leave_the_gpu_idle_are_a_single_one() -> None:
    shapes = [(64, 128)] * 5  # two programs each along the columns, the shorter side; two matrices a group
    assert gram_layout(shapes, 2, TILE, cache=33_000, programs=4).groups == ((0, 2), (2, 4), (4, 5))
    idle = gram_layout(shapes, 2, TILE, cache=33_000, programs=5)
    assert (idle.groups, idle.resident) == (((0, 5),), False)
    # All in one group, however few.
    assert gram_layout(shapes, 2, TILE, cache=1e9, programs=100).resident


def test_batches_are_of_one_kind_and_length_and_fit_the_memory() -> None:
    small, large, other = Wanted((96, 80), 2, 8, 60), Wanted((400, 300), 2, 8, 60), Wanted((90, 100), 2, 8, 60)
    wanted = [small, large, other, small]
    assert batches(wanted, "aaaa", 1e12) == [(1,), (0, 2, 3)]
    assert batches(wanted, "aaab", 1e12) == [(1,), (0, 2), (3,)]
    assert batches([small] * (BATCH + 1), "a" * (BATCH + 1), 1e12) == [tuple(range(BATCH)), (BATCH,)]
    # What the dense tensors take is held for a whole batch, however many matrices are in it.
    fixed = BATCH * small.dense_bytes
    assert batches([small] * 3, "aaa", fixed + 2 * small.bytes) == [(0, 1), (2,)]
    assert batches([small] * 3, "aaa", fixed) == []


def test_a_dense_length_wastes_at_most_a_quarter() -> None:
    for n in range(257, 20_000, 7):
        assert n <= dense_length(n) < 1.25 * n + 64
        assert dense_length(n) % 16 == 0
