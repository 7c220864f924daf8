"""Several messages at once, against hashlib."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inilora_kernels.kernels.cpu import sha256
from inilora_kernels.kernels.cpu.sha256 import BLOCK, MOST, digests, pays
from inilora_kernels.kernels.threads import share

# Where the padding begins another block, and beside it.
ENDS = [0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128]


def message(length: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def hashed(content: Tensor) -> str:
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def test_the_standards_own_example() -> None:
    """FIPS 180-4's abc."""
    abc = torch.tensor(list(b"abc"), dtype=torch.uint8)
    ((_, found),) = digests(iter([("abc", [abc])]), 1)
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from(ENDS) | st.integers(0, 20_000), max_size=3 * MOST),
    blocks=st.integers(1, 60),
    at_once=st.integers(1, MOST),
)
def test_against_hashlib(lengths: list[int], blocks: int, at_once: int) -> None:
    """Of any number and lengths, in parts of any number of blocks: lanes run out and are filled at different times."""
    contents = [message(length, seed) for seed, length in enumerate(lengths)]
    given_in_parts = ((place, content.split(BLOCK * blocks)) for place, content in enumerate(contents))
    found = list(digests(given_in_parts, at_once))
    assert dict(found) == {place: hashed(content) for place, content in enumerate(contents)}
    assert len(found) == len(contents)


def test_parts_share_their_memory() -> None:
    """As a reader's do: a part is overwritten when the next one is asked for."""
    contents = [message(1000 + place, place) for place in range(2 * MOST)]

    def parts(content: Tensor) -> Iterator[Tensor]:
        memory = torch.empty(BLOCK, dtype=torch.uint8)
        for part in content.split(BLOCK):
            yield memory[: len(part)].copy_(part)

    found = dict(digests(((hashed(content), parts(content)) for content in contents), MOST))
    assert list(found) == list(found.values())
    assert len(found) == len(contents)


def test_a_tensors_bytes_are_hashed_whatever_its_dtype() -> None:
    W = torch.randn(40, 30)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ((_, found),) = digests(iter([("W", [W.to(dtype)])]), MOST)
        assert found == hashed(W.to(dtype).view(torch.uint8))


def test_threads_share_the_messages() -> None:
    contents = [message(3000, seed) for seed in range(40)]
    found: dict[int, str] = {}

    def work(todo: Iterator[int]) -> None:
        for place, digest in digests(((place, [contents[place]]) for place in todo), 3):
            found[place] = digest

    share(work, range(len(contents)), 3)
    assert found == {place: hashed(content) for place, content in enumerate(contents)}


def test_what_fails_in_reading_ends_it() -> None:
    def parts() -> Iterator[Tensor]:
        yield torch.zeros(BLOCK)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(digests(((place, parts()) for place in count()), 2))


@pytest.mark.parametrize("fails", [True, False])
def test_what_was_begun_is_closed(fails: bool) -> None:
    """Whether one fails or nobody asks for more; though the error is still held."""
    closed: list[int] = []

    def parts(place: int) -> Iterator[Tensor]:
        try:
            yield torch.zeros(BLOCK)
            if fails and place == 2:
                raise OSError("gone")
            yield torch.zeros(BLOCK * (1 if place == 0 else 1000))
        finally:
            closed.append(place)

    found = digests(((place, parts(place)) for place in range(4)), 4)
    try:
        next(found)
    except OSError as error:
        assert fails
        held = error  # noqa: F841
    found.close()
    assert sorted(closed) == [0, 1, 2, 3]


@pytest.mark.parametrize("lane", [0, MOST - 1])
def test_what_does_not_agree_with_hashlib_is_never_used(lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = sha256._advance

    def wrong(state: Any, places: Any, blocks: int) -> None:
        advance(state, places, blocks)
        state[0, lane] ^= 1

    monkeypatch.setattr(sha256, "_MAY_PAY", True)
    monkeypatch.setattr(sha256, "_advance", wrong)
    monkeypatch.setattr(wrong, "overloads", advance.overloads, raising=False)
    monkeypatch.setattr(sha256, "_seconds", sha256._seconds.__wrapped__)
    assert not pays(MOST, 1 << 30)


def test_it_pays_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(together: float, alone: float) -> Any:
        return lambda: (together, alone)

    monkeypatch.setattr(sha256, "_MAY_PAY", True)
    monkeypatch.setattr(sha256, "_seconds", timed(together=2.0, alone=1.0))
    assert [pays(messages, 1 << 30) for messages in (1, 2, 3, 8, 80)] == [False, False, True, True, True]
    monkeypatch.setattr(sha256, "_seconds", timed(together=7.0, alone=1.0))
    assert not pays(80, 1 << 30)
    monkeypatch.setattr(sha256, "_MAY_PAY", False)
    assert not pays(8, 1 << 30)
