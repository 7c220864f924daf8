"""What numbers alone do not show: races, reads and writes out of bounds; and planted faults that must be found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from inilora_kernels.kernels.gpu import kernels as triton_kernels
from inilora_kernels.kernels.gpu.layout import BlockField, StripField

from .cases import DTYPES, guarded_run, make, make_wave, poisoned_run, small_tiles
from .interpreter import interpreted
from .planting import planted
from .shifting import Shifted


def test_any_program_order_gives_the_same_bits_and_writes_every_output() -> None:
    straight = poisoned_run(None)
    for seed in (1, 2):
        for one, other in zip(straight, poisoned_run(seed), strict=True):
            assert torch.equal(one, other)
    assert not any(torch.isnan(buffer).any() for buffer in straight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_bands_stay_untouched(dtype: torch.dtype) -> None:
    guarded_run(dtype=dtype)


STRIPS, BLOCKS = triton_kernels.gradient_products_kernel, triton_kernels.adam_kernel


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inside_rows = row < rows", "inside_rows = row <= rows"),
        ("inside_rank = r < rank", "inside_rank = r <= rank"),
        ("inside_columns = column < last_column", "inside_columns = column <= last_column"),
        ("mask=inside_rows[:, None] & (column_next < last_column)[None, :]", "mask=inside_rows[:, None]"),
    ],
)
def test_an_off_by_one_mask_is_caught(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, right, wrong))


def test_a_wrong_stride_is_caught() -> None:
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, "r[:, None] * B_stride", "r[:, None] * stride"))
    with pytest.raises(AssertionError):
        guarded_run(planted(STRIPS, "row[:, None] * stride", "row[:, None] * (stride - 1)"))


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        # Every strip writes the first strip's slot: the last program to run wins, and the other slots stay unwritten.
        (STRIPS, "P_offset = tl.multiple_of(tl.load(work + STRIP_P_OFFSET), 16)", "P_offset = tl.load(strips + 8)"),
        # Every Adam block leaves its share of the Gram matrix in the first one's place.
        (
            BLOCKS,
            "share_offset = tl.multiple_of(tl.load(work + BLOCK_SHARE_OFFSET), 16)",
            "share_offset = tl.load(blocks + 8)",
        ),
    ],
)
def test_a_race_between_two_programs_is_caught(kernel: Any, right: str, wrong: str) -> None:
    racing = planted(kernel, right, wrong)
    chosen = {"kernel": racing} if kernel is STRIPS else {"adam": racing}
    first, second = (poisoned_run(seed, **chosen) for seed in (1, 2))
    assert any(torch.isnan(buffer).any() for buffer in first)
    assert not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_two_to_the_thirty_third_elements(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a buffer of 64 matrices of 53248×16384; an offset cut to 32 bits would end the process."""
    weights, problems = make([(70, 45), (33, 97)], [3, 5], dtype)
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, arguments, options: (arguments, options))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *arguments: None)
    with interpreted():
        wave = make_wave(weights, problems, small_tiles(5, columns=32), [2, 1])
        plain = make_wave(weights, problems, small_tiles(5, columns=32), [2, 1])
        wave.strips[:, StripField.W_OFFSET] += Shifted.SHIFT
        for field in (StripField.A_OFFSET, StripField.B_OFFSET, StripField.P_OFFSET, StripField.Q_OFFSET):
            wave.strips[:, field] += Shifted.SHIFT
        wave.blocks[:, BlockField.X_OFFSET] += Shifted.SHIFT
        wave.blocks[:, BlockField.SLOTS_OFFSET] += Shifted.SHIFT
        names = ("weights", "factors", "means", "squares", "slots")
        buffers = {name: getattr(wave, name) for name in names}
        for name in names:
            setattr(wave, name, Shifted(buffers[name]))
        for one in (wave, plain):
            one.advance(2)
            one.judge(wide=True)
    for name in names:
        assert torch.equal(buffers[name], getattr(plain, name)), name
    assert torch.equal(wave.losses, plain.losses)
