"""Where the cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from inilora_kernels import FactorSet
from inilora_kernels.errors import OutputError
from inilora_kernels.places import cache_folder, file_to_write
from inilora_kernels.storage import cache

from .storage.entries import FIRST, example


def test_a_user_without_a_home_makes_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INILORA_CACHE", "~nobody-has-this-name/cache")
    assert cache_folder() is None
    assert cache.find(FIRST, FIRST) is None
    with pytest.warns(UserWarning, match="no home folder"):
        cache.keep(FIRST, example())


@pytest.mark.parametrize("name", ["results/", "results//", "results/.", "results/..", "", "."])
def test_a_name_that_only_a_folder_can_have_is_not_given_to_a_file(name: str, tmp_path: Path) -> None:
    """Path("results/") is Path("results"), and a file of that name was written."""
    for write in (file_to_write, FactorSet({"a.query": example()}, {}).save):
        with pytest.raises(OutputError, match="names a folder"):
            write(f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir())
