"""The direct solver's kernel, interpreted, against float64; its races, bounds and planted faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from inilora_kernels.kernels.gpu import gram as triton_gram
from inilora_kernels.kernels.gpu.gram_layout import GramField

from .cases import DTYPES, guard
from .gram_cases import SHAPES, batch_of, check, matrices, unit_vectors
from .interpreter import GRAM, interpreted
from .planting import planted
from .shifting import Shifted

sizes = st.integers(1, 150)


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-4, 0.02, 8.0]),
    cache=st.sampled_from([math.inf, 2e4, 0.0]),
)
def test_products_of_mixed_shapes_match_float64(
    shapes: list[tuple[int, int]], dtype: torch.dtype, scale: float, cache: float
) -> None:
    weights = matrices(shapes, dtype, scale)
    with interpreted():
        batch = batch_of(weights, cache=cache)
        X = unit_vectors(batch)
        batch(X)
    check(batch, X, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 3e3])
def test_small_and_large_weights_keep_their_digits(dtype: torch.dtype, size: float) -> None:
    """float16's parts are scaled by what ||W|| allows: neither its subnormals nor its overflow are met."""
    weights = matrices([(70, 45), (33, 100)], dtype, size)
    with interpreted():
        batch = batch_of(weights)
        X = unit_vectors(batch)
        batch(X)
    check(batch, X, weights)


def poisoned_run(seed: int | None, kernel: Any = GRAM) -> list[Tensor]:
    weights = matrices(SHAPES, torch.bfloat16)
    with interpreted(gram=kernel, seed=seed):
        batch = batch_of(weights, cache=2e4)
        # A product that is read before it is whole comes back as NaN.
        for index, place in enumerate(batch.layout.places):
            batch.Y[index, :, : place.rows] = math.nan
            batch.Z[index, :, : place.columns] = math.nan
        batch(unit_vectors(batch))
    return [batch.Y, batch.Z]


def test_any_program_order_gives_the_same_bits_and_writes_every_output() -> None:
    straight = poisoned_run(None)
    for seed in (1, 2):
        for one, other in zip(straight, poisoned_run(seed), strict=True):
            assert torch.equal(one, other)
    assert not any(torch.isnan(buffer).any() for buffer in straight)


def guarded_run(dtype: torch.dtype = torch.float32, kernel: Any = GRAM) -> None:
    """Raise AssertionError if the kernel reads or writes outside its tensors."""
    weights = matrices(SHAPES[:2], dtype)
    with interpreted(gram=kernel):
        batch = batch_of(weights)
        X = unit_vectors(batch)
        wholes = []
        for name in ("weights", "X", "Y", "Z", "exponents"):
            inner, whole = guard(getattr(batch, name))
            setattr(batch, name, inner)
            wholes.append((name, inner, whole))
        batch(X)
        check(batch, X, weights)
    for name, inner, whole in wholes:
        assert not torch.isnan(inner).any(), f"{name}: a read out of bounds came back as NaN"
        assert int(torch.isnan(whole).sum()) == 1024, f"{name}: a guard band was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_bands_stay_untouched(dtype: torch.dtype) -> None:
    guarded_run(dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=(own < owned)[:, None] & inside[None, :]", "mask=(own <= owned)[:, None] & inside[None, :]"),
        ("inside = start + inner < padded_through", "inside = start + inner <= padded_through"),
        ("mask=(start + inner < through)[:, None]", "mask=(start + inner <= through)[:, None]"),
        ("own[:, None] * stride", "own[:, None] * (stride - 1)"),
        ("vector[None, :] * found_stride", "vector[None, :] * given_stride"),
    ],
)
def test_a_planted_fault_is_caught(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        guarded_run(kernel=planted(triton_gram.gram_kernel, right, wrong))


def test_a_race_between_two_programs_is_caught() -> None:
    right = "found_offset = tl.multiple_of(tl.load(row + GRAM_FOUND_OFFSET), 16)"
    racing = planted(triton_gram.gram_kernel, right, "found_offset = tl.load(work + GRAM_FOUND_OFFSET)")
    first, second = (poisoned_run(seed, racing) for seed in (1, 2))
    assert any(torch.isnan(buffer).any() for buffer in first)
    assert not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_two_to_the_thirty_third_elements(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = matrices(SHAPES[:2], dtype)
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, arguments, options: (arguments, options))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *arguments: None)
    with interpreted():
        batch, plain = batch_of(weights), batch_of(weights)
        X = unit_vectors(batch)
        for work in batch._work:
            work[:, GramField.W_OFFSET] += Shifted.SHIFT
        batch.weights = Shifted(batch.weights)  # type: ignore[assignment]
        batch(X)
        plain(X)
    assert torch.equal(batch.Z, plain.Z)
