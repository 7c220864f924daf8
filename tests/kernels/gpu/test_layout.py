"""Where things lie: no two at one place, nothing outside, and the fields that the kernels read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.kernels.gpu.layout import BlockField, StripField, SumField, idle, lay_out, weight_bytes
from inilora_kernels.kernels.gpu.tiles import tiles

sides = st.integers(1, 900)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
    rank=st.integers(1, 16),
    parts=st.integers(1, 5),
    itemsize=st.sampled_from([2, 4]),
)
def test_every_element_is_written_by_one_program(
    shapes: list[tuple[int, int]], rank: int, parts: int, itemsize: int
) -> None:
    chosen = tiles("sm_89", itemsize, rank)
    layout = lay_out(shapes, [rank] * len(shapes), [parts] * len(shapes), chosen)
    read, slots = np.zeros(layout.weights, int), np.zeros(layout.slots, int)
    for row in layout.strip_work():
        field = {name: int(row[place]) for place, name in enumerate(StripField)}
        columns = np.arange(field[StripField.FIRST_COLUMN], field[StripField.LAST_COLUMN])
        for i in range(field[StripField.ROWS]):
            read[field[StripField.W_OFFSET] + i * field[StripField.STRIDE] + columns] += 1
        padded = np.arange(-(-field[StripField.ROWS] // 16) * 16)
        for r in range(field[StripField.RANK]):
            slots[field[StripField.P_OFFSET] + r * field[StripField.STRIDE] + columns] += 1
            slots[field[StripField.Q_OFFSET] + r * field[StripField.B_STRIDE] + padded] += 1
    assert set(read) == {1}
    assert set(slots) == {1}
    assert layout.weights * itemsize == sum(weight_bytes(shape, itemsize) for shape in shapes)
    blocks = layout.block_work()
    shares = np.sort(blocks[:, BlockField.SHARE_OFFSET])
    assert np.array_equal(shares, np.arange(len(blocks)) * chosen.rank**2)
    assert layout.shares == len(blocks) * chosen.rank**2
    assert layout.sum_work()[:, SumField.COUNT].min() > 0


def test_offsets_beyond_two_to_the_thirty_first() -> None:
    """64 matrices of a 405B model's size: every offset is an int64 and none has wrapped."""
    layout = lay_out([(53_248, 16_384)] * 64, [8] * 64, [1] * 64, tiles("sm_90", 2, 8))
    work = layout.strip_work()
    assert work.dtype == np.int64
    assert work[:, StripField.W_OFFSET].max() == 64 * 53_248 * 16_384 - 256 * 16_384 > 2**31
    assert len(work) == layout.strip_programs == 64 * 208
    # What a kernel multiplies in int32: a row of a strip, a row of a factor.
    assert 256 * work[:, StripField.STRIDE].max() < 2**31
    assert 128 * work[:, StripField.B_STRIDE].max() < 2**31


def test_equal_waves_have_equal_layouts() -> None:
    one, other = (lay_out([(40, 24), (24, 40)], [4, 4], [1, 2], tiles("sm_89", 2, 4)) for _ in range(2))
    assert one == other
    assert one != lay_out([(24, 40), (40, 24)], [4, 4], [1, 2], tiles("sm_89", 2, 4))


@pytest.mark.parametrize("finished", [[], [0], [0, 1]])
def test_idle_programs_have_nothing_to_do(finished: list[int]) -> None:
    layout = lay_out([(40, 24), (24, 40)], [4, 4], [1, 2], tiles("sm_89", 2, 4))
    strips, sums, blocks = work = [layout.strip_work(), layout.sum_work(), layout.block_work()]
    idle(work, finished)
    for rows, field, matrix in (
        (strips, StripField.ROWS, StripField.MATRIX),
        (strips, StripField.LAST_COLUMN, StripField.MATRIX),
        (sums, SumField.COUNT, SumField.MATRIX),
        (blocks, BlockField.RANK, BlockField.MATRIX),
    ):
        assert np.array_equal(rows[:, field] == 0, np.isin(rows[:, matrix], finished))
