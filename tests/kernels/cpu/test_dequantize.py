"""Each decoding kernel on random codes, against the same formula in torch: to the bit, as both round once a product."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.kernels.cpu.dequantize import (
    decode_bytes,
    decode_nibbles,
    decode_words_along_columns,
    decode_words_along_k,
)

AWQ_SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]
counts = st.integers(1, 5)


def packed(codes: Tensor, shifts: list[int]) -> Tensor:
    """Eight codes along the last dimension as one int32 each."""
    words = (codes.view(*codes.shape[:-1], -1, 8).long() << torch.tensor(shifts)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@settings(max_examples=30, deadline=None)
@given(rows=counts, groups=counts, width=st.integers(1, 9), short=st.integers(0, 8), seed=st.integers(0, 99))
def test_bytes(rows: int, groups: int, width: int, short: int, seed: int) -> None:
    """The last group may be short."""
    generator = torch.Generator().manual_seed(seed)
    k = max((groups - 1) * width + 1, groups * width - short)
    codes = torch.randint(256, (rows, k), dtype=torch.uint8, generator=generator)
    table, scale = torch.randn(256, generator=generator), torch.randn(rows, groups, generator=generator)
    out = torch.empty(rows, k)
    decode_bytes(codes.numpy(), table.numpy(), scale.numpy(), width, out.numpy())
    assert torch.equal(out, table[codes.long()] * scale.repeat_interleave(width, dim=1)[:, :k])


@settings(max_examples=30, deadline=None)
@given(rows=counts, groups=counts, half=st.integers(1, 6), seed=st.integers(0, 99))
def test_nibbles(rows: int, groups: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = 2 * half * groups
    codes = torch.randint(16, (rows, k), dtype=torch.uint8, generator=generator)
    table = torch.randn(16, generator=generator)
    offset, scale = torch.randn(2, rows, groups, generator=generator)
    out = torch.empty(rows, k)
    low_and_high = codes.view(rows, -1, 2)
    halves = low_and_high[..., 0] | low_and_high[..., 1] << 4
    decode_nibbles(halves.numpy(), table.numpy(), offset.numpy(), scale.numpy(), out.numpy())
    wide = [one.repeat_interleave(2 * half, dim=1) for one in (offset, scale)]
    assert torch.equal(out, (table[codes.long()] - wide[0]) * wide[1])


@settings(max_examples=30, deadline=None)
@given(eighths=counts, columns=counts, groups=counts, seed=st.integers(0, 99))
def test_words_along_k_and_along_columns(eighths: int, columns: int, groups: int, seed: int) -> None:
    """The same codes in GPTQ's order and in AWQ's, with the rows' groups in any order."""
    generator = torch.Generator().manual_seed(seed)
    k, columns = 8 * eighths, 8 * columns
    codes = torch.randint(16, (columns, k), generator=generator)
    group = torch.randint(groups, (k,), generator=generator)
    offset, scale = torch.randn(2, groups, columns, generator=generator)
    expected = (codes.float() - offset[group].T) * scale[group].T
    along_k = packed(codes, list(range(0, 32, 4))).T.contiguous()
    along_columns = packed(codes.T.contiguous(), AWQ_SHIFTS)
    operands = offset.numpy(), scale.numpy(), group.numpy()
    for out, decode, words, more in (
        (torch.empty(columns, k), decode_words_along_k, along_k, ()),
        (torch.empty(columns, k), decode_words_along_columns, along_columns, (torch.tensor(AWQ_SHIFTS).numpy(),)),
    ):
        decode(words.numpy(), *operands, *more, out.numpy())
        assert torch.equal(out, expected)
