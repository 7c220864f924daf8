"""The header of a GGUF file: its metadata as it stands there, and where each tensor is. No value is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from ...storage.reading import opened
from .tensor import what_it_is

# Bytes of the metadata's values by their type's number. 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT16, _UINT32 = 8, 9, 2, 4
_PARTS = b"split.count"
# The largest vocabularies take tens of megabytes.
_MOST_HEADER, _MOST_ENTRIES, _MOST_DIMENSIONS = 1 << 28, 1_000_000, 8
# Of all arrays together: tokens, their scores and types, merges. transformers goes through them one by one.
_MOST_ELEMENTS = 4_000_000
# Of the tensors' first bytes; the usual one is 32.
_MOST_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class Described:
    """One tensor: the number of its type, its shape with the longest stride first, and its bytes in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """metadata: the bytes of all its entries. count: of those."""

    version: int
    count: int
    metadata: bytes
    tensors: tuple[Described, ...]

    @property
    def parts(self) -> int:
        """Of how many files this is one, as llama.cpp's `gguf-split` says."""
        key = struct.pack("<Q", len(_PARTS)) + _PARTS
        found = self.metadata.find(key)
        kind, count = struct.unpack_from("<IH", self.metadata, found + len(key)) if found >= 0 else (_UINT16, 1)
        return int(count) if kind == _UINT16 else 1

    def without_values(self) -> bytes:
        """A GGUF file with the same metadata and the same tensors, all of them empty."""
        parts = [struct.pack("<4sIQQ", b"GGUF", self.version, len(self.tensors), self.count), self.metadata]
        for tensor in self.tensors:
            name = tensor.name.encode()
            parts.append(struct.pack(f"<Q{len(name)}sIQIQ", len(name), name, 1, 0, 0, 0))
        return b"".join(parts) + bytes(_MOST_ALIGNMENT)


def read_header(file: Path, blocks: Mapping[int, tuple[int, int]]) -> Header:
    """The header of a GGUF file.

    blocks: how many values of each type are stored together, and in how many bytes.

    Raises CheckpointError if the file is none, is damaged or cut short, or has tensors of other types.
    """
    with opened(file) as stream:
        cursor = _Cursor(file, io.BufferedReader(stream), os.fstat(stream.fileno()).st_size)
        if cursor.take(4) != b"GGUF":
            raise cursor.corrupt("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise cursor.corrupt(f"version {version}; those that are read are 2 and 3, little-endian")
        count, entries = cursor.number("Q"), cursor.number("Q")
        if max(count, entries) > _MOST_ENTRIES:
            raise cursor.corrupt(f"{count:,} tensors and {entries:,} entries of metadata")
        begin, alignment = cursor.place, 32
        for _ in range(entries):
            key, kind = cursor.text(), cursor.number("I")
            value = cursor.value(kind)
            if key == "general.alignment":
                alignment = int.from_bytes(value, "little") if kind == _UINT32 else 0
        metadata = bytes(cursor.read[begin:])
        if not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise cursor.corrupt(f"an alignment of {alignment}")
        tensors = [_tensor(cursor, blocks) for _ in range(count)]
        begin = -(-cursor.place // alignment) * alignment
        placed = tuple(Described(one.name, one.type, one.shape, begin + one.offset, one.size) for one in tensors)
    _require_apart(cursor, placed)
    return Header(version, entries, metadata, placed)


def _tensor(cursor: _Cursor, blocks: Mapping[int, tuple[int, int]]) -> Described:
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.corrupt(f"{name} has {dimensions:,} dimensions")
    sides = tuple(cursor.number("Q") for _ in range(dimensions))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in blocks:
        raise cursor.corrupt(f"{name} is of type {kind}, which the installed gguf does not know")
    values, size = blocks[kind]
    if sides and sides[0] % values:
        raise cursor.corrupt(f"{name} has rows of {sides[0]:,} values, stored {values} at a time")
    return Described(name, kind, sides[::-1], offset, math.prod(sides) // values * size)


def _require_apart(cursor: _Cursor, tensors: tuple[Described, ...]) -> None:
    """The tensors must lie in the file, each in bytes of its own, and have different names."""
    end, names = 0, set()
    for one in sorted(tensors, key=lambda one: one.offset):
        if one.offset < end or one.offset + one.size > cursor.size:
            raise cursor.corrupt(f"{one.name} in bytes {one.offset:,} to {one.offset + one.size:,} of {cursor.size:,}")
        if one.name in names:
            raise cursor.corrupt(f"{one.name} is there twice")
        end = one.offset + one.size
        names.add(one.name)


class _Cursor:
    """Reads a file from its beginning, and keeps what it has read."""

    def __init__(self, file: Path, stream: io.BufferedReader, size: int) -> None:
        self.file, self.stream, self.size = file, stream, size
        self.read = bytearray()
        self.elements = 0

    @property
    def place(self) -> int:
        return len(self.read)

    def take(self, count: int) -> bytes:
        if count > min(self.size, _MOST_HEADER) - self.place:
            raise self.corrupt(f"its header goes on for {count:,} bytes after byte {self.place:,} of {self.size:,}")
        content = self.stream.read(count)
        self.read += content
        return content

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0])

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a name that is not UTF-8, before byte {self.place:,}") from error

    def value(self, kind: int) -> bytes:
        """The bytes of one value of the metadata, of an array those of its last part."""
        if kind == _STRING:
            return self.take(self.number("Q"))
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self.elements += count
            if self.elements > _MOST_ELEMENTS:
                raise self.corrupt(f"arrays of {self.elements:,} values in its metadata")
            if inner in _SIZES:
                return self.take(count * _SIZES[inner])
            if inner == _STRING:
                for _ in range(count):
                    self.value(inner)
                return b""
            kind = inner
        if kind not in _SIZES:
            raise self.corrupt(f"a value of type {kind}, before byte {self.place:,}")
        return self.take(_SIZES[kind])

    def corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: truncated or corrupt GGUF file ({what}){what_it_is(self.file)}; download or write it again"
        )
