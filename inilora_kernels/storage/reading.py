"""The one way in which this library opens files: regular ones only, no longer than they should be, errors of ours.

A pipe would be waited for, a device never ends, and a link may lead to either, or to itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InitializationError, is_out_of_files, is_out_of_memory
from ..memory import empty

# The index of the largest models takes 15 MB.
MOST_JSON = 1 << 28

# What A and B may be stored in.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Opening must not wait for a pipe's other end; on regular files this changes nothing.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# Buffers may be expanded, position ids for one. In bytes.
_MOST_REPEATED = 1 << 24

Refusal = type[InitializationError]


def is_there(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere; False for names that no file can have.

    Unlike Path.exists, which raises on these. What is there is then opened, and refused if it is no regular file.
    """
    return os.path.lexists(path)


def absolute(path: Path) -> Path:
    """The path without links, as Path.resolve; a link that leads to itself stays.

    Raises CheckpointError for a relative path where the working folder has been removed.
    """
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the folder you are in has been removed; change to another one") from error


@contextlib.contextmanager
def reporting(path: Path, refusal: Refusal = CheckpointError, part: str = "") -> Iterator[None]:
    """Turn OSError and a lack of memory, anywhere in the block, into an error of ours that names the file.

    part: of the file that is read, a tensor, for the message.
    """
    cannot = f"cannot read {part}" if part else "cannot be read"
    try:
        yield
    except FileNotFoundError as error:
        raise refusal(
            f"{error.filename or path}: {cannot}: no such file; check the path, or download it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "raise the limit with `ulimit -n`" if is_out_of_files(error) else "check the path and its rights"
        raise refusal(f"{error.filename or path}: {cannot}: {reason}; {advice}") from error
    except (MemoryError, RuntimeError) as error:
        if "unable to open file" in str(error):  # torch's words, of a file that is mapped
            raise refusal(f"{path}: {cannot}: {error}; check its rights, and the limits of this process") from error
        if not is_out_of_memory(error):
            raise
        raise refusal(f"{path}: {cannot}: not enough memory; free some, or raise its limit") from error


def require_regular(path: Path, refusal: Refusal = CheckpointError) -> None:
    """Raise `refusal` unless this is a regular file that may be read; for files that another library opens."""
    with opened(path, refusal):
        pass


def require_stored(tensor: Tensor, file: Path, name: str, refusal: Refusal = CheckpointError) -> None:
    """Refuse a tensor without an array of values, and a large one that repeats the few values that the file holds."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise refusal(f"{file}: {name} is sparse, quantized by torch or without values; save it as a plain tensor")
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held + _MOST_REPEATED:
        raise refusal(
            f"{file}: {name} would take {tensor.nbytes / 1e9:.1f} GB and the file holds {held / 1e9:.1g} GB of it, "
            f"repeated; save the tensor itself, contiguous"
        )


@contextlib.contextmanager
def opened(path: Path, refusal: Refusal = CheckpointError, part: str = "") -> Iterator[io.FileIO]:
    """A regular file, open for reading, unbuffered. Raises `refusal`, also for an OSError within the block."""
    with reporting(path, refusal, part), io.FileIO(path, opener=_open) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise refusal(f"{path}: a pipe, a socket or a device, not a regular file; put the file itself there")
        yield stream


def read_bytes(path: Path, refusal: Refusal = CheckpointError, most: int | None = None) -> bytes:
    """The content of a regular file. most: of bytes. Raises `refusal`."""
    with opened(path, refusal) as stream:
        content = stream.readall() if most is None else _at_most(stream, most + 1)
    if most is not None and len(content) > most:
        raise refusal(f"{path}: longer than {most / 1e6:,.0f} MB, which no such file is; download it again")
    return content


def read_json(path: Path, refusal: Refusal = CheckpointError) -> dict[str, Any]:
    """A JSON object from a regular file of a sensible length. Raises `refusal`."""
    return json_object(read_bytes(path, refusal, MOST_JSON), path, refusal)


def json_object(stored: bytes, path: Path, refusal: Refusal = CheckpointError) -> dict[str, Any]:
    """The JSON object that a file's bytes are. Raises `refusal`, naming the file."""
    try:
        content = json.loads(stored.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise refusal(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise refusal(f"{path}: a JSON {type(content).__name__}, not an object; download it again")
    return content


def empty_tensor(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor of a file. Raises CheckpointError if there is not enough."""
    with reporting(path, part=name):
        return empty(shape, dtype)


def _open(path: str, flags: int) -> int:
    return os.open(path, _FLAGS)


def _at_most(stream: io.FileIO, count: int) -> bytes:
    parts = []
    while count and (part := stream.read(min(count, 1 << 24))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
