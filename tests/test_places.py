"""Where the cache is."""

from __future__ import annotations

import pytest

from inilora_kernels.places import cache_folder
from inilora_kernels.storage import cache

from .storage.entries import FIRST, example


def test_a_user_without_a_home_makes_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INILORA_CACHE", "~nobody-has-this-name/cache")
    assert cache_folder() is None
    assert cache.find(FIRST, FIRST) is None
    with pytest.warns(UserWarning, match="no home folder"):
        cache.keep(FIRST, example())
