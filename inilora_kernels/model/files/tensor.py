"""What every kind of file offers for each of its tensors, and what the kinds share."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...storage.reading import empty_tensor, opened

_HASH_CHUNK = 1 << 20
# Bytes of the blocks that SHA-256 takes (kernels/cpu/sha256.py, which brings numba).
_HASHED = 64
# Bytes of the blocks of rows that a tensor is read in. The calls for one take some 0.1 ms.
_BLOCK = 1 << 20
# A block of odd rows is 32 of them or 64.
_LONGEST_ROW = 1 << 17


class StoredTensor(Protocol):
    """One tensor as stored in a file, without its values.

    name: in its file.
    file: where it is; for a live model's tensor, what messages call the model.
    offset: of its first byte, if the file holds the values row by row in one piece; None otherwise.
    """

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int | None: ...

    def read(self, rows: slice = slice(None)) -> Tensor:
        """The tensor, or rows of it (no step), contiguous, on the CPU, in its own memory and in the stored dtype.

        Raises CheckpointError if the file has changed or vanished since it was opened.
        """

    def sha256(self) -> str:
        """sha256 (hex) of the values as stored, the same in every kind of file. Raises what `read` raises."""


@dataclass(frozen=True)
class ContiguousTensor:
    """A tensor whose values a file holds row by row in one piece; see `StoredTensor`.

    It is read into its own memory, so that the peak is one tensor: with a memory map, the file's pages would count as
    well.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, rows: slice = slice(None)) -> Tensor:
        start, shape = self._range(rows)
        tensor = empty_tensor(self.file, self.name, shape, self.dtype)
        with opened(self.file, part=self.name) as stream:
            stream.seek(start)
            self._fill(stream, tensor_bytes(tensor))
        return tensor

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[slice], Tensor]]:
        """`read`, for one range of rows after another: the file stays open, and each range takes the last one's memory.

        A thread that opens files waits for the others each time.
        """
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        with opened(self.file, part=self.name) as stream:

            def read(rows: slice) -> Tensor:
                nonlocal memory
                start, shape = self._range(rows)
                count = math.prod(shape) * self.dtype.itemsize
                if len(memory) < count:
                    memory = empty_tensor(self.file, self.name, (count,), torch.uint8)
                stream.seek(start)
                self._fill(stream, tensor_bytes(memory[:count]))
                return memory[:count].view(self.dtype).view(shape)

            yield read

    def blocks(self) -> Iterator[Tensor]:
        """`read`, some rows at a time in order, in a multiple of 64 bytes but for the last.

        A block is overwritten by the next one.
        """
        with self.reader() as read:
            yield from map(read, blocks_of_rows(self.shape, self.dtype))

    def _range(self, rows: slice) -> tuple[int, tuple[int, ...]]:
        """Where in the file these rows begin, and their shape."""
        if not self.shape:
            return self.offset, ()
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(stop - start, 0), *self.shape[1:])
        return self.offset + start * size_of(shape[1:], self.dtype), shape

    def sha256(self) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_HASH_CHUNK))
        left = size_of(self.shape, self.dtype)
        with opened(self.file, part=self.name) as stream:
            stream.seek(self.offset)
            while left:
                chunk = buffer[: min(left, _HASH_CHUNK)]
                self._fill(stream, chunk)
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()

    def _fill(self, stream: io.FileIO, buffer: memoryview) -> None:
        while buffer:
            count = stream.readinto(buffer)
            if not count:
                raise CheckpointError(f"{self.file}: ends within {self.name}; the file has changed since it was opened")
            buffer = buffer[count:]


def reader(tensor: StoredTensor) -> AbstractContextManager[Callable[[slice], Tensor]]:
    """`tensor.read`, for one range of rows after another; what it returns may be overwritten by the next range."""
    return tensor.reader() if isinstance(tensor, ContiguousTensor) else contextlib.nullcontext(tensor.read)


def blocks_of(stored: StoredTensor) -> Callable[[], Iterator[Tensor]] | None:
    """`blocks` of a tensor that has them, where several tensors at a time can be read so; None for any other."""
    if isinstance(stored, ContiguousTensor) and has_short_rows(stored.shape, stored.dtype):
        return stored.blocks
    return None


def has_short_rows(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether blocks of a tensor's rows are small enough for several tensors at a time to be read so."""
    return len(shape) > 0 and size_of(shape[1:], dtype) <= _LONGEST_ROW


def size_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """In bytes."""
    return math.prod(shape) * dtype.itemsize


def blocks_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[slice]:
    """The rows of a tensor (at least one axis), some at a time in order, as `Target.blocks` reads them.

    >>> list(blocks_of_rows((300, 2048), torch.float32))
    [slice(0, 128, None), slice(128, 256, None), slice(256, 300, None)]
    """
    row = max(1, size_of(shape[1:], dtype))
    least = _HASHED // math.gcd(row, _HASHED)
    step = max(1, _BLOCK // (row * least)) * least
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor's values."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor.contiguous())).hexdigest()


def what_it_is(file: Path) -> str:
    """The end of an error about an unreadable file: what it is, if that is known."""
    with opened(file) as stream:
        if stream.read(19) == b"version https://git":
            return "; this is a Git LFS pointer, not the weights: run `git lfs pull`"
    return ""
