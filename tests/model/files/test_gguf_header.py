"""Headers of GGUF files, against gguf's own reader, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.files.gguf_header import read_header

from ..gguf_model import TYPES, model, write


def test_the_header_is_read_as_gguf_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", model(), TYPES.Q4_K)
    ours = read_header(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    theirs = gguf.GGUFReader(path)
    assert [(one.name, one.type, one.shape, one.offset, one.size) for one in ours.tensors] == [
        (one.name, one.tensor_type, tuple(one.shape[::-1]), one.data_offset, one.n_bytes) for one in theirs.tensors
    ]
    (tmp_path / "empty.gguf").write_bytes(ours.without_values())
    empty = gguf.GGUFReader(tmp_path / "empty.gguf")
    assert [one.name for one in empty.tensors] == [one.name for one in theirs.tensors]
    assert {key: field.contents() for key, field in empty.fields.items()} == {
        key: field.contents() for key, field in theirs.fields.items()
    }


def numbers(place: int, kind: str, *values: int) -> Callable[[bytes], bytes]:
    """Bytes in which other numbers stand at a place."""
    form = struct.Struct(f"<{kind}")
    return lambda content: content[:place] + form.pack(*values) + content[place + form.size :]


def in_tensor(name: bytes, place: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    """Another number in a tensor's entry, so many bytes after its name."""
    return lambda content: numbers(content.index(name) + len(name) + place, kind, value)(content)


QUERY = b"blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (numbers(4, "I", 1), "version 1"),
        (lambda content: content[:4] + content[4:8][::-1] + content[8:], "version 50331648"),
        (numbers(8, "Q", 2**63), "tensors"),
        (numbers(16, "Q", 2**40), "entries of metadata"),
        (numbers(24, "Q", 2**62), "its header goes on"),
        (lambda content: content.replace(b"general.architecture", b"\xff" * 20), "not UTF-8"),
        (in_tensor(QUERY, 0, "I", 2**31), "dimensions"),
        (in_tensor(QUERY, 4, "Q", 31), "rows of 31 values"),
        (in_tensor(QUERY, 12, "Q", 2**61), "in bytes"),
        (in_tensor(QUERY, 20, "I", 999), "of type 999"),
        (in_tensor(QUERY, 24, "Q", 0), "in bytes"),
        (lambda content: content.replace(QUERY, b"blk.1.attn_q.weight"), "is there twice"),
        (lambda content: content[:-1000], "in bytes"),
        (in_tensor(b"tokenizer.ggml.tokens", 8, "Q", 2**50), "arrays of"),
        (in_tensor(b"tokenizer.ggml.tokens", 4, "I", 9), "a value of type"),
        (in_tensor(b"llama.block_count", 4, "I", 999_999), "more than"),
        (in_tensor(b"llama.block_count", 4, "I", 2**31), "num_hidden_layers"),
    ],
)
def test_damaged_headers(
    tmp_path: Path, spoil: Callable[[bytes], bytes], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inilora_kernels.model.aside._MOST_MODULES", 100)
    path = write(tmp_path / "model.gguf", model(), TYPES.Q8_0)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=what) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
