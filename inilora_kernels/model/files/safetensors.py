"""Safetensors files: headers only when opened; a tensor's own bytes when read; room for tensors when written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ...errors import CheckpointError
from ...storage.reading import opened
from ...storage.schema import parse
from .tensor import ContiguousTensor, StoredTensor, what_it_is

# safetensors' names of the dtypes. Others (packed 4- and 6-bit floats, say) count as bytes: nothing reads them, and as
# integers they are refused as targets.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "I64": torch.int64,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8} | {
    name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()
}

# The limit of safetensors itself.
_MOST_HEADER = 100_000_000


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _Header(BaseModel):
    """The header: an entry for each tensor, and the metadata."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: dict[str, str] | None = Field(None, alias="__metadata__")


def open_safetensors(file: Path) -> tuple[dict[str, ContiguousTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and its free-form metadata.

    Reads the header alone, also of a file larger than the memory that the process may map. Raises CheckpointError.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _MOST_HEADER):
            raise _corrupt(file, f"a header of {length:,} bytes in a file of {size:,}")
        content = stream.read(length)
    if not content.startswith(b"{"):
        raise _corrupt(file, "no header")
    header = parse(_Header, content, f"{file}: header", CheckpointError)
    entries = sorted(header.__pydantic_extra__.items(), key=lambda item: item[1].data_offsets)
    _require_whole(file, entries, size - 8 - length)
    tensors = {
        name: ContiguousTensor(
            name, file, _DTYPES.get(entry.dtype, torch.uint8), entry.shape, 8 + length + entry.data_offsets[0]
        )
        for name, entry in entries
    }
    return tensors, dict(header.metadata or {})


def write_empty_safetensors(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """A new safetensors file with room for these tensors, to be filled at the offsets that `open_safetensors` gives.

    Raises CheckpointError for a dtype that safetensors does not know, and OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest dtype first, as in safetensors' own files, so that every tensor is aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}, which safetensors cannot hold; convert it")
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with file.open("xb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)


def _require_whole(file: Path, entries: Iterable[tuple[str, _Entry]], size: int) -> None:
    """The tensors must follow one another without gaps, each as long as its dtype and shape say, to the file's end."""
    end = 0
    for name, entry in entries:
        start, stop = entry.data_offsets
        if entry.dtype not in _BITS:
            raise _corrupt(file, f"{name} is of an unknown dtype, {entry.dtype[:40]}")
        if start != end or 8 * (stop - start) != math.prod(entry.shape) * _BITS[entry.dtype]:
            raise _corrupt(file, f"{name}: {entry.dtype} of shape {entry.shape} in bytes {start} to {stop}")
        end = stop
    if end != size:
        raise _corrupt(file, f"{size:,} bytes of values, and the header describes {end:,}")


def _corrupt(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: truncated or corrupt safetensors file ({what}){what_it_is(file)}; download or write it again"
    )
