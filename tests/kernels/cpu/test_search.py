"""The search in one compiled call against the search step by step, which takes the same parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inilora_kernels.solvers import krylov_search
from inilora_kernels.solvers.krylov import principal
from inilora_kernels.solvers.triplets import Principal

from ...solvers.test_krylov import with_spectrum


def both_ways(W: Tensor, ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list[bool], list[Principal]]:
    """Whether the compiled call left it to the other, and what each way finds."""
    left: list[bool] = []
    in_one_call = krylov_search._in_one_call

    def watched(*arguments: object) -> object:
        found = in_one_call(*arguments)  # type: ignore[arg-type]
        left.append(found[0])
        return found

    monkeypatch.setattr(krylov_search, "_in_one_call", watched)
    compiled = principal(W, ranks)
    monkeypatch.setattr(krylov_search, "_in_one_call", lambda *arguments: (True, None))
    return left, [compiled, principal(W, ranks)]


@pytest.mark.parametrize("ranks", [[1], [8], [3, 40], [60]])
@pytest.mark.parametrize("shape", [(700, 560), (560, 900)])
def test_it_finds_the_same_in_as_many_passes(
    shape: tuple[int, int], ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    W = with_spectrum(*shape, lambda i: i**-0.4).bfloat16()
    left, (one, other) = both_ways(W, ranks, monkeypatch)
    assert left == [False]
    assert all(one.certified.values())
    assert (one.passes, one.vectors) == (other.passes, other.vectors)
    torch.testing.assert_close(one.S, other.S, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(one.V.abs(), other.V.abs(), rtol=0.0, atol=1e-5)


def test_a_block_without_a_new_direction_is_left_to_the_search_that_draws_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, (one, other) = both_ways(torch.eye(560), [8], monkeypatch)
    assert left == [True]
    assert torch.equal(one.V, other.V)
    assert one.certified[8]


def test_what_float32_hides_goes_on_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    W = with_spectrum(600, 560, lambda i: torch.where(i <= 4, 1.0 / i, 3e-3 * i**-0.1))
    left, (one, other) = both_ways(W, [8], monkeypatch)
    assert left == [False]
    assert torch.equal(one.V, other.V)
    assert one.certified[8]
