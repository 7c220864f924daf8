"""The cache: damaged and foreign entries are not used, a bad cache costs no result, and its upkeep."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inilora_kernels import Certificate, Factors
from inilora_kernels.places import cache_folder
from inilora_kernels.storage import cache, cache_upkeep

FIRST, SECOND = "ab" * 32, "cd" * 32


def example(source: str = FIRST) -> Factors:
    generator = torch.Generator().manual_seed(int(source[:2], 16))
    A, B = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    return Factors(A=A, B=B, certificate=Certificate(1.5, 1.0, 3.0, 10), source_sha256=source)


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


def test_a_user_without_a_home_makes_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INILORA_CACHE", "~nobody-has-this-name/cache")
    assert cache_folder() is None
    assert cache.find(FIRST, FIRST) is None
    with pytest.warns(UserWarning, match="no home folder"):
        cache.keep(FIRST, example())


def test_prune_by_age_and_by_size() -> None:
    for number, key in enumerate(("aa" * 32, "bb" * 32, "cc" * 32)):
        cache.keep(key, example())
        path = cache.entry_path(key)
        assert path is not None
        os.utime(path, (1_000_000 * (number + 1),) * 2)
    sizes = [entry.size for entry in cache_upkeep.entries()]
    assert [entry.key[:2] for entry in cache_upkeep.entries()] == ["aa", "bb", "cc"]
    # Found again is used again.
    assert cache.find("aa" * 32, FIRST) is not None
    assert [entry.key[:2] for entry in cache_upkeep.prune(older_than=3600)] == ["bb", "cc"]
    cache.keep("bb" * 32, example())
    assert not cache_upkeep.prune(to_size=2 * max(sizes))
    assert [entry.key[:2] for entry in cache_upkeep.prune(to_size=max(sizes))] == ["aa"]


def test_clearing_removes_entries_and_nothing_else() -> None:
    cache.keep(FIRST, example())
    folder = cache_folder()
    assert folder is not None
    (folder / "notes.txt").write_text("mine")
    (folder / FIRST[:2] / "model.safetensors").write_text("mine")
    cache_upkeep.remove(cache_upkeep.entries())
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["model.safetensors", "notes.txt"]
