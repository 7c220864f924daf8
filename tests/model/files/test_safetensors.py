"""safetensors files of every dtype, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.files.safetensors import open_safetensors, write_empty_safetensors

from ..checkpoints import MIXED, assert_holds, refusal


def test_bare_file_of_every_dtype(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "any name.safetensors")
    assert_holds(tmp_path / "any name.safetensors", MIXED)
    assert open_checkpoint(tmp_path / "any name.safetensors").config is None


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    save_file({"w": torch.ones(50, 50)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    assert "truncated or corrupt" in refusal(tmp_path)


def test_corrupt_safetensors_header(tmp_path: Path) -> None:
    save_file({"w": torch.ones(50, 50)}, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[8:12] = b"\0\0\0\0"
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "truncated or corrupt" in refusal(tmp_path)


def test_room_for_tensors_is_laid_out_as_safetensors_does(tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in MIXED.items()} | {'über "a"': torch.zeros(3, 0)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_empty_safetensors(tmp_path / "ours.safetensors", open_safetensors(tmp_path / "theirs.safetensors")[0])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
