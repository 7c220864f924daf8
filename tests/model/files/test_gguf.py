"""GGUF files by their stored bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint

from ..gguf_model import TYPES, model, write


def test_sha256_is_that_of_the_stored_bytes(tmp_path: Path) -> None:
    one, other = model(), model()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    first, second = (
        open_checkpoint(write(tmp_path / f"{place}.gguf", live, TYPES.Q8_0)) for place, live in enumerate((one, other))
    )
    differ = [name for name in first.weights if first.sha256(name) != second.sha256(name)]
    assert differ == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize("keep", [0, 3, 100, 2000])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "model.gguf", model(), TYPES.Q8_0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        open_checkpoint(path)


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    """llama.cpp's gguf-split: factors of one part would be of a part of the model."""
    for count in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"{count}.gguf", "llama")
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(CheckpointError, match=r"one of 2 parts of a model, .*`llama-gguf-split --merge`"):
        open_checkpoint(tmp_path / "2.gguf")
    assert not open_checkpoint(tmp_path / "1.gguf").tensors
