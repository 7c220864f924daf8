"""The cache: damaged and foreign entries are not used, a bad cache costs no result, and its upkeep."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inilora_kernels.storage import cache, cache_upkeep

from .entries import FIRST, SECOND, example


def test_an_entry_comes_back() -> None:
    assert cache.find(FIRST, FIRST) is None
    cache.keep(FIRST, example())
    found = cache.find(FIRST, FIRST)
    assert found is not None
    assert torch.equal(found.A, example().A)
    assert found.certificate == example().certificate
    assert cache.find(FIRST, SECOND) is None


def test_every_flipped_bit_is_noticed() -> None:
    cache.keep(FIRST, example())
    path = cache.entry_path(FIRST)
    assert path is not None
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert cache.find(FIRST, FIRST) is None, place
    path.write_bytes(whole)
    assert cache.find(FIRST, FIRST) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-4],
        lambda content: content + b"\0" * 8,
        lambda content: content[:8] + bytes(len(content) - 8),
        lambda content: content.replace(b"1.5", b"1.0"),
        lambda content: content.replace(FIRST.encode(), SECOND.encode()),
    ],
)
def test_damage_is_noticed(damage: Callable[[bytes], bytes]) -> None:
    cache.keep(FIRST, example())
    cache.keep(SECOND, example(SECOND))
    path = cache.entry_path(FIRST)
    assert path is not None
    path.write_bytes(damage(path.read_bytes()))
    assert cache.find(FIRST, FIRST) is None
    assert [entry.key for entry in cache_upkeep.damaged_entries()] == [FIRST]


def test_another_matrixs_entry_is_not_used() -> None:
    cache.keep(FIRST, example())
    cache.keep(SECOND, example())
    first, second = cache.entry_path(FIRST), cache.entry_path(SECOND)
    assert first is not None
    assert second is not None
    first.write_bytes(second.read_bytes())
    assert cache.find(FIRST, FIRST) is None


@pytest.mark.parametrize("place", ["{tmp}/file/cache", "{tmp}/" + "x" * 300, "/proc/cache", "/dev/null"])
def test_a_cache_that_cannot_be_written_costs_no_result_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("INILORA_CACHE", place.format(tmp=tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for key in (FIRST, SECOND):
            assert cache.find(key, FIRST) is None
            cache.keep(key, example())
    assert [str(one.message).partition(" in ")[0] for one in caught] == ["finished matrices are not cached"]
    assert not cache_upkeep.entries()
