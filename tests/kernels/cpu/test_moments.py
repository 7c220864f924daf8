from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inilora_kernels.kernels.cpu.moments import NOTHING, moments

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 90),
    k=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["rows", "columns", "every other"]),
    scale=st.sampled_from([1.0, 1e-7, 300.0]),
)
def test_against_float64(d: int, k: int, dtype: torch.dtype, layout: str, scale: float) -> None:
    drawn = torch.randn(2 * d, 2 * k, generator=torch.Generator().manual_seed(d * k)).mul(scale).to(dtype)
    W = {"rows": drawn[:d, :k], "columns": drawn.T[:d, :k], "every other": drawn[::2, ::2]}[layout]
    found, wide = moments(W), W.double()
    assert found.largest == float(wide.abs().max())
    # Sums of n float64, each rounded once: n·2⁻⁵³ of the sum of magnitudes, with room.
    assert found.total == pytest.approx(float(wide.sum()), rel=0, abs=1e-12 * float(wide.abs().sum()))
    assert found.squares == pytest.approx(float(wide.square().sum()), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    d=st.integers(1, 60),
    k=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
    spoiled=st.sampled_from([None, math.nan, math.inf]),
    seed=st.integers(0, 9),
)
def test_rows_given_in_parts(d: int, k: int, dtype: torch.dtype, rows: int, spoiled: float | None, seed: int) -> None:
    W = torch.randn(d, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if spoiled is not None:
        W[seed % d, seed % k] = spoiled
    found = NOTHING
    for part in W.split(rows):
        found = moments(part, found)
    # The same bits; NaN is no number's equal.
    assert repr(found) == repr(moments(W))
    # Laid out as torch has the column of a row.
    assert repr(moments(W[:, :1])) == repr(moments(W[:, 0][None].clone().T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_entry_that_is_no_number(dtype: torch.dtype, entry: float) -> None:
    W = torch.full((40, 70), torch.finfo(dtype).max, dtype=dtype)
    assert moments(W).largest == torch.finfo(dtype).max
    W[39, 69] = entry
    assert not math.isfinite(moments(W).largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_zeros_and_the_smallest_entries(dtype: torch.dtype) -> None:
    W = torch.zeros(9, 9, dtype=dtype).neg()
    assert moments(W).largest == 0.0
    W[4, 4] = -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert moments(W).largest == -float(W[4, 4]) > 0.0
