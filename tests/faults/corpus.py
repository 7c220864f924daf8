"""Small real inputs of every reader, and ways to spoil them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# JSON values that no field expects, or that lie at an end of its range.
STRANGE = [
    None,
    True,
    "",
    "text",
    "[/x]",
    -1,
    0,
    1e308,
    1e-308,
    10**30,
    [],
    {},
    [[]],
    {"a": {"b": []}},
    float("nan"),
    "\ud83d",
]


def spoiled_bytes(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Truncated, extended, zeroed, flipped, and of another kind altogether."""
    length = len(content)
    yield "empty", b""
    yield "null bytes", bytes(length)
    yield "git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "pickle", b"\x80\x04cos\nsystem\n(S'touch CANARY'\ntR."
    yield "huge header", struct.pack("<Q", 2**62) + content[8:]
    yield "extended", content + b"\0" * 9
    for part in (1, 7, 8, 9, length // 2, length - 1):
        yield f"cut at {part}", content[:part]
    for _ in range(12):
        place, bit = chance.randrange(min(length, 4000)), chance.randrange(8)
        yield f"bit {bit} of byte {place}", content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def spoiled_json(content: Any, chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """One field replaced by something strange, or left out; and content that is not a JSON object."""
    for text in (b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"):
        yield f"{text[:6]!r}", text
    fields = list(_fields(content))
    for _ in range(count):
        path = chance.choice(fields)
        value = chance.choice([*STRANGE, "left out"])
        changed = json.loads(json.dumps(content))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if value == "left out":
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {value!r}", json.dumps(changed).encode()


def _fields(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _fields(value, (*path, key))


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def spoiled_safetensors(content: bytes, chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    yield from spoiled_bytes(content, chance)
    header, data = header_of(content)
    for what, text in spoiled_json(header, chance, count):
        yield f"header: {what}", with_header(text, data)
    entry = header.get("__metadata__", {}).get("inilora_kernels")
    if entry is not None:
        for what, text in spoiled_json(json.loads(entry), chance, 3 * count):
            metadata = {"inilora_kernels": text.decode("latin-1")}
            yield f"metadata: {what}", with_header(json.dumps({**header, "__metadata__": metadata}).encode(), data)
    number = struct.Struct("<f")
    for value in (float("nan"), float("inf"), 3e38):
        yield f"values {value}", content[: len(content) - len(data)] + number.pack(value) * (len(data) // 4)


Spoil = Callable[[bytes, random.Random, int], Iterator[tuple[str, bytes]]]


def spoiled(file: Path, chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Every way to spoil a file, by its kind."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        yield from spoiled_safetensors(content, chance, count)
    elif file.suffix == ".json":
        yield from spoiled_json(json.loads(content), chance, 2 * count)
    else:
        yield from spoiled_bytes(content, chance)
