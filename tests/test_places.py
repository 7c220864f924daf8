"""Where the cache is."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from inilora_kernels import FactorSet, save_inilora_pt
from inilora_kernels.adapters.folder import adapter_path
from inilora_kernels.errors import FactorFileError, OutputError
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


def test_a_home_that_no_shell_has_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash leaves --output=~/x as it is, and a folder called ~ was made, the next victim of rm -r ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    factors = FactorSet({"a.query": example()}, {})
    for write in (factors.save, functools.partial(save_inilora_pt, factors)):
        with pytest.raises(
            OutputError, match=f"~ stands for your home folder in a shell alone; give {tmp_path}/home/x"
        ):
            write("~/x")
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_not_the_folder_where_one_happens_to_be() -> None:
    for read in (FactorSet.load, adapter_path):
        with pytest.raises(FactorFileError, match="a path is empty"):
            read("")
