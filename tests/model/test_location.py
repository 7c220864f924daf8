"""What was typed for a model: a path, or an id on the hub, and the name that was probably meant."""

from pathlib import Path

import pytest

from inilora_kernels.model.location import hub_id, located, near_names


def test_a_path_that_is_there_stays_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for given in ("model", "./model", "model/", Path("model")):
        assert located(given) == Path("model")
    for given in ("./modle", "modle/", "~/model", ".."):
        assert hub_id(located(given)) is None


def test_a_folder_that_may_not_be_listed_has_no_near_names(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").touch()
    assert near_names(tmp_path / "file.safetensors" / "model") == ""
    assert near_names(tmp_path / "fil.safetensors") == '; did you mean "file.safetensors"?'
    assert near_names(tmp_path) == ""
