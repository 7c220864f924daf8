"""A model that changes between the survey and the solver: the result is neither kept nor returned."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels import approximate_model
from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.unchanged import watch
from inilora_kernels.storage.cache_upkeep import entries

main_job = importlib.import_module("inilora_kernels.approximate")


def age(file: Path) -> None:
    """As if the file had been written long ago."""
    os.utime(file, (1_000_000, 1_000_000))


@pytest.mark.parametrize("old", [False, True])
def test_changed_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (
        {f"0.{name}_proj.weight": torch.randn(16, 24, generator=generator) for name in "qv"} for _ in range(2)
    )
    model = tmp_path / "model.safetensors"
    save_file(before, model)
    if old:
        age(model)
    survey = main_job.survey

    def saved_meanwhile(*arguments: Any, in_memory: bool) -> Any:
        result = survey(*arguments, in_memory=in_memory)
        save_file(after, model)
        return result

    monkeypatch.setattr(main_job, "survey", saved_meanwhile)
    with pytest.raises(CheckpointError, match=r"0\.q_proj.*changed"):
        approximate_model(model, 2, solver="krylov", progress=False)
    assert not entries()


def test_a_file_touched_but_the_same_is_hashed_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    monkeypatch.setattr("time.time_ns", lambda: file.stat().st_ctime_ns + 10_000_000_000)
    hashed = []

    def sha256() -> str:
        hashed.append(file.read_bytes())
        return "ab"

    unchanged = watch([file], sha256)
    assert unchanged("ab")
    assert not hashed
    file.chmod(0o600)
    age(file)
    assert unchanged("ab")
    assert not unchanged("cd")
    assert len(hashed) == 2
