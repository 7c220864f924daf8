from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.kernels.cpu.gram import MOST_SLOTS, FusedGramReader, crowded, spread, takes

# A sum of n ≤ 2^13 products, each rounded once: far below n·u of ‖W‖·‖X‖ where the signs are random.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 4e-6 * 2.0**-29}
# The dtypes of both products.
SAME, WIDE, MIXED = (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float32)


def _amid_nan(d: int, k: int, dtype: torch.dtype, by_columns: bool, seed: int) -> Tensor:
    """A d×k matrix whose memory lies between NaN on every side."""
    shape = (k, d) if by_columns else (d, k)
    whole = torch.full((shape[0] + 2, shape[1] + 5), float("nan"), dtype=dtype)
    stored = whole[1:-1, 2:-3]
    stored.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return stored.T if by_columns else stored


def _check(W: Tensor, width: int, threads: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    arithmetic, image = dtypes
    assert takes(W, arithmetic)
    read = FusedGramReader(W, width, threads, arithmetic, image)
    # Twice: what the first reading leaves in the work space must not show in the second.
    for seed in (1, 2):
        X = torch.randn(width, W.shape[1], generator=torch.Generator().manual_seed(seed)).to(arithmetic)
        Y, Z = read(X)
        wide_Y = X.double() @ W.double().T
        wide_Z = wide_Y @ W.double()
        assert (Y.shape, Y.dtype) == (wide_Y.shape, arithmetic)
        assert (Z.shape, Z.dtype) == (wide_Z.shape, torch.float64 if W.dtype == torch.float64 else image)
        assert float((Y - wide_Y).norm() / wide_Y.norm()) < TOLERANCE[arithmetic]
        assert float((Z - wide_Z).norm() / wide_Z.norm()) < TOLERANCE[Z.dtype]


@settings(deadline=None, max_examples=60)
@given(
    d=st.integers(8, 700),
    k=st.integers(8, 700),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    dtypes=st.sampled_from([SAME, WIDE, MIXED]),
    by_columns=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_products_against_float64(
    d: int,
    k: int,
    width: int,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, torch.dtype],
    by_columns: bool,
    threads: int,
    seed: int,
) -> None:
    W = _amid_nan(d, k, dtype, by_columns, seed)
    if takes(W, dtypes[0]):
        _check(W, width, threads, dtypes)


@pytest.mark.parametrize("dtypes", [SAME, WIDE, MIXED])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("d", "k"), [(2600, 1100), (1100, 2600), (49, 5000), (5000, 49)])
def test_many_strips(d: int, k: int, by_columns: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """More parts than slots, and strips that hold the fewest rows."""
    _check(_amid_nan(d, k, torch.float32, by_columns, seed=0), width=24, threads=2, dtypes=dtypes)


@pytest.mark.parametrize("dtypes", [SAME, WIDE, MIXED])
@pytest.mark.parametrize("by_columns", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(by_columns: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    W = _amid_nan(1999, 777, torch.bfloat16, by_columns, seed=0)
    X = torch.randn(16, 777, generator=torch.Generator().manual_seed(1)).to(dtypes[0])
    one, *others = (FusedGramReader(W, 16, threads, *dtypes)(X) for threads in (1, 2, 3, MOST_SLOTS + 5))
    for other in others:
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_with_rows_further_apart_has_the_same_entries_and_products(by_columns: bool, threads: int) -> None:
    """More rows than a thread copies at a time."""
    W = torch.randn(2600, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    W = W.T if by_columns else W
    copy = spread(W, threads)
    assert (crowded(W), crowded(copy)) == (True, False)
    assert torch.equal(copy, W)
    assert min(copy.stride()) == W.stride(0 if by_columns else 1) == 1
    X = torch.randn(4, W.shape[1], generator=torch.Generator().manual_seed(1))
    products, expected = FusedGramReader(copy, 4, threads)(X), FusedGramReader(W, 4, threads)(X)
    assert all(map(torch.equal, products, expected))


def test_what_it_does_not_take() -> None:
    assert not takes(torch.ones(64, 64, dtype=torch.float64), torch.float32)
    assert not takes(torch.ones(64, 128)[:, ::2], torch.float32)
    assert not takes(torch.ones(64, 7), torch.float64)
