"""What was typed for a model: a path, or an id on the hub, and the name that was probably meant."""

from pathlib import Path

import pytest

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.location import hub_id, located


def test_a_path_that_is_there_stays_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for given in ("model", "./model", "model/", Path("model")):
        assert located(given) == Path("model")
    for given in ("./modle", "modle/", "~/model", ".."):
        assert hub_id(located(given)) is None


def test_an_empty_path_is_not_the_folder_where_one_is() -> None:
    for given in ("", " "):
        with pytest.raises(CheckpointError, match="path is empty"):
            located(given)


def test_the_address_of_a_page_is_no_path() -> None:
    for end in ("", "/", "/tree/main", "/blob/main/model.safetensors"):
        with pytest.raises(CheckpointError, match='did you mean "org/name"'):
            open_checkpoint(f"https://huggingface.co/org/name{end}")
