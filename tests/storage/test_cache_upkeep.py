"""The cache's upkeep: pruned by age and size, cleared of entries alone."""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

import pytest

from inilora_kernels.errors import OutputError
from inilora_kernels.places import cache_folder
from inilora_kernels.storage import cache, cache_upkeep

from .entries import FIRST, example


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


def test_a_broken_disk_is_no_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.keep(FIRST, example())

    def broken(path: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(OutputError, match=r"cannot be listed: Input/output error"):
        cache_upkeep.entries()


def test_what_is_no_file_is_no_entry() -> None:
    cache.keep(FIRST, example())
    folder = cache_folder()
    assert folder is not None
    (folder / FIRST[:2] / f"{FIRST[:2]}{'0' * 62}.safetensors").mkdir()
    os.mkfifo(folder / FIRST[:2] / f"{FIRST[:2]}{'1' * 62}.safetensors")
    assert [entry.key for entry in cache_upkeep.entries()] == [FIRST]
    assert cache_upkeep.damaged_entries() == []
    assert [entry.key for entry in cache_upkeep.prune(to_size=0)] == [FIRST]
