"""Safetensors files: headers only when opened; a tensor's own bytes when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError
from .tensor import ContiguousTensor, what_it_is

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
    "BOOL": torch.bool,
}


def open_safetensors(file: Path) -> tuple[dict[str, ContiguousTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and its free-form metadata.

    Raises CheckpointError and OSError.
    """
    header, start = _header(file)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        name: ContiguousTensor(
            name,
            file,
            _DTYPES.get(record["dtype"], torch.uint8),
            tuple(record["shape"]),
            start + record["data_offsets"][0],
        )
        for name, record in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    return tensors, metadata


def _header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        # safetensors checks sizes, offsets, overlaps and the file's length; what follows relies on that.
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(length)), 8 + length
    except SafetensorError as error:
        raise CheckpointError(f"{file}: truncated or corrupt safetensors file ({error}){what_it_is(file)}") from error
