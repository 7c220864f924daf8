"""Each decoding kernel on random codes against the same formula in torch, to the bit: both round in the same places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.kernels.cpu.dequantize import (
    decode_bytes,
    decode_columns,
    decode_e2m1,
    decode_e4m3,
    decode_integers,
    decode_pairs,
    decode_tables,
    decode_words,
    rounds_to,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
counts = st.integers(1, 5)
dtypes = st.sampled_from(DTYPES)


def as_written(out: Tensor) -> Any:
    return out.view({torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(out.dtype, out.dtype)).numpy()


def halves(codes: Tensor) -> Any:
    """Codes of 4 bits, two a byte, the low half first."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().numpy()


def random_codes(rows: int, k: int, most: int, seed: int) -> tuple[torch.Generator, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return generator, torch.randint(most, (rows, k), dtype=torch.uint8, generator=generator)


@settings(max_examples=30, deadline=None)
@given(rows=counts, groups=counts, width=st.integers(1, 9), short=st.integers(0, 8), dtype=dtypes, seed=counts)
def test_bytes(rows: int, groups: int, width: int, short: int, dtype: torch.dtype, seed: int) -> None:
    """The last group may be short."""
    k = max((groups - 1) * width + 1, groups * width - short)
    generator, codes = random_codes(rows, k, 256, seed)
    codes = torch.where(codes & 127 == 127, 0, codes)  # NaN, which no comparison finds equal
    table, scale = torch.randn(256, generator=generator), torch.randn(rows, groups, generator=generator)
    wide = scale.repeat_interleave(width, dim=1)[:, :k]
    out = torch.empty(rows, k, dtype=dtype)
    decode_bytes(codes.numpy(), table.numpy(), width, scale.numpy(), as_written(out))
    assert torch.equal(out, (table[codes.long()] * wide).to(dtype))
    decode_e4m3(codes.numpy(), width, scale.numpy(), as_written(out))
    assert torch.equal(out, (codes.view(torch.float8_e4m3fn).float() * wide).to(dtype))


@pytest.mark.parametrize("flush", [False, True])
def test_every_8_bit_float(flush: bool) -> None:
    """Also where subnormal numbers count as zero: E4M3's own are none of float32's."""
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    expected = every.view(torch.float8_e4m3fn).float()
    out = torch.empty(1, 256)
    torch.set_flush_denormal(flush)
    try:
        decode_e4m3(every.numpy(), 256, np.ones((1, 1), np.float32), out.numpy())
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("scale", [1.0, -0.37, 2.0**-100, 2.0**-120, 3e-39, 2.0**121, 0.0, float("inf")])
def test_every_8_bit_float_in_bfloat16(scale: float) -> None:
    """Rounded by their significands, or one by one where a product may be subnormal or infinite."""
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scales = torch.tensor([[scale, 1.3 * scale], [1.7 * scale, scale]])
    out = torch.empty(2, 256, dtype=torch.bfloat16)
    decode_e4m3(every.numpy(), 128, scales.numpy(), as_written(out))
    expected = (every.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, 1)).bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(out.view(torch.int16)[kept], expected.view(torch.int16)[kept])


@settings(max_examples=30, deadline=None)
@given(rows=counts, groups=counts, half=st.integers(1, 6), dtype=dtypes, seed=counts)
def test_4_bit_floats(rows: int, groups: int, half: int, dtype: torch.dtype, seed: int) -> None:
    generator, codes = random_codes(rows, 2 * half * groups, 16, seed)
    scale = torch.randn(rows, groups, generator=generator)
    out = torch.empty(codes.shape, dtype=dtype)
    decode_e2m1(halves(codes), 2 * half, scale.numpy(), as_written(out))
    expected = (E2M1[codes.long()] * scale.repeat_interleave(2 * half, dim=1)).to(dtype)
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())


@settings(max_examples=20, deadline=None)
@given(rows=counts, groups=counts, blocks=st.integers(1, 3), dtype=dtypes, seed=counts)
def test_tables(rows: int, groups: int, blocks: int, dtype: torch.dtype, seed: int) -> None:
    """Each of the 256 tables that a group may have, byte by byte."""
    generator, codes = random_codes(rows, 16 * blocks * groups, 16, seed)
    tables = torch.randn(256, 16, generator=generator).to(dtype)
    group_of = torch.randint(256, (rows, groups), dtype=torch.uint8, generator=generator)
    planes = tables.view(torch.uint8).view(256, 16, -1).mT.reshape(-1)
    out = torch.empty(codes.shape, dtype=dtype)
    decode_tables(halves(codes), group_of.numpy(), planes.numpy(), as_written(out))
    assert torch.equal(out, tables[group_of.long().repeat_interleave(16 * blocks, 1), codes.long()])


@settings(max_examples=40, deadline=None)
@given(rows=counts, groups=counts, half=st.integers(1, 6), bits=st.sampled_from([4, 8]), dtype=dtypes, seed=counts)
def test_integers(rows: int, groups: int, half: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    k = 2 * half * groups
    generator, codes = random_codes(rows, k, 1 << bits, seed)
    offset, scale = torch.randn(2, rows, groups, generator=generator)
    group = torch.arange(k) // (2 * half)
    packed = halves(codes) if bits == 4 else codes.numpy()
    out = torch.empty(rows, k, dtype=dtype)
    decode_integers(packed, bits, offset.numpy(), scale.numpy(), False, as_written(out))
    assert torch.equal(out, ((codes.float() - offset[:, group]) * scale[:, group]).to(dtype))
    scale, offset = scale.to(dtype), offset.to(dtype)
    decode_integers(packed, bits, offset.float().numpy(), scale.float().numpy(), True, as_written(out))
    assert torch.equal(out, codes.to(dtype) * scale[:, group] + offset[:, group])


def random_words(*shape: int, generator: torch.Generator) -> Tensor:
    bounds = torch.iinfo(torch.int32)
    return torch.randint(bounds.min, bounds.max, shape, dtype=torch.int32, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    eights=st.integers(1, 6),
    groups=counts,
    first=st.integers(0, 5),
    dtype=dtypes,
    seed=counts,
)
def test_columns(rows: int, eights: int, groups: int, first: int, dtype: torch.dtype, seed: int) -> None:
    """Groups in any order; with fewer rows or columns than a tile has, and with tiles that overlap."""
    generator, k, d = torch.Generator().manual_seed(seed), 8 * eights, rows + first + 2
    words = random_words(eights, d, generator=generator)
    group = torch.randint(groups, (k,), generator=generator)
    offset, scale = torch.randn(2, groups, d, generator=generator)
    out = torch.empty(rows, k, dtype=dtype)
    decode_columns(words.numpy(), first, group.numpy(), offset.numpy(), scale.numpy(), as_written(out))
    codes = (words.unsqueeze(1) >> 4 * torch.arange(8).view(-1, 1) & 15).view(k, d)
    expected = ((codes.float() - offset[group]) * scale[group]).to(dtype).T
    assert torch.equal(out, expected[first : first + rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Ties, the largest numbers and what rounds to infinity, subnormal ones, infinities and NaN."""
    bits = torch.arange(0, 1 << 32, 40_503, dtype=torch.int64)
    ties = torch.arange(0, 1 << 16, 7) * (1 << 16) + (1 << 15)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.0, 65520.0, 2.0**-24, 2.0**-25, -0.0])
    every = torch.cat([torch.cat([bits, ties]).to(torch.int32).view(torch.float32), special])
    scale = every.unsqueeze(1)
    out = torch.empty(len(every), 1, dtype=dtype)
    decode_bytes(np.zeros((len(every), 1), np.uint8), np.ones(256, np.float32), 1, scale.numpy(), as_written(out))
    expected = scale.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(out[kept].view(torch.int16), expected[kept].view(torch.int16))


@settings(max_examples=40, deadline=None)
@given(
    words=st.integers(1, 20),
    groups=counts,
    width=st.integers(1, 9),
    skip=st.integers(0, 30),
    dtype=dtypes,
    seed=counts,
)
def test_words(words: int, groups: int, width: int, skip: int, dtype: torch.dtype, seed: int) -> None:
    generator, shifts = torch.Generator().manual_seed(seed), torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
    k, first = groups * width, min(skip, 8 * words - 1)
    rows = max(1, 8 * words - first - seed)
    stored = random_words(k, words, generator=generator)
    offset, scale = torch.randn(2, rows, groups, generator=generator)
    out = torch.empty(rows, k, dtype=dtype)
    decode_words(stored.numpy(), shifts.int().numpy(), first, offset.numpy(), scale.numpy(), as_written(out))
    codes = (stored.T.unsqueeze(1) >> shifts.view(-1, 1) & 15).reshape(8 * words, k)[first : first + rows]
    each = torch.arange(k) // width
    assert torch.equal(out, ((codes.float() - offset[:, each]) * scale[:, each]).to(dtype))


@settings(max_examples=20, deadline=None)
@given(rows=counts, groups=counts, blocks=st.integers(1, 3), dtype=dtypes, seed=counts)
def test_values_of_codes(rows: int, groups: int, blocks: int, dtype: torch.dtype, seed: int) -> None:
    width = 16 * blocks
    generator, codes = random_codes(rows, width * groups, 16, seed)
    values, scale = torch.randn(16, generator=generator), torch.randn(rows, groups, generator=generator)
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    decode_pairs(packed.numpy(), values.numpy(), width, scale.numpy(), as_written(out))
    assert torch.equal(out, (values[codes.long()] * scale.repeat_interleave(width, 1)).to(dtype))


def test_float64_is_for_others_to_round_to() -> None:
    assert [rounds_to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [True, True, False]
