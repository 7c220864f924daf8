"""Model files in: which tensors a checkpoint holds, and one of them at a time.

Opening a checkpoint reads headers only. A tensor of a safetensors file is then read straight from its bytes
on disk into memory of its own, so that the peak is that tensor (a memory map would count the file's pages on
top). A torch .bin file is only ever loaded with `weights_only=True`: tensors, never code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"

_HASH_CHUNK = 1 << 20

# safetensors' names of the dtypes. Others (packed 4- and 6-bit floats, say) are bytes to us: nothing reads
# them, and as integers they are refused as targets.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it is, without its numbers.

    offset: its first byte in a safetensors file; None in a torch .bin file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors by name, and config.json where there is one.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"query.weight": torch.eye(2)}, path)
    >>> checkpoint = open_checkpoint(path)
    >>> checkpoint.tensors["query.weight"].shape, checkpoint.config
    ((2, 2), None)
    >>> checkpoint.read("query.weight")
    tensor([[1., 0.],
            [0., 1.]])
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any] | None

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor in its own memory, contiguous, in the checkpoint's dtype.

        rows: a part of the first axis; no step.

        From safetensors only these bytes are read. From a .bin in torch's format since 1.6 they are copied
        from a memory map that is closed again; the older format is loaded whole, and the last such file kept.

        Raises CheckpointError if the file has changed or vanished since it was opened.
        """
        entry = self.tensors[name]
        if entry.offset is None:
            stored = _torch_tensor(entry.file, name)
            return (stored[rows] if stored.ndim else stored).clone(memory_format=torch.contiguous_format)
        shape, start = entry.shape, 0
        if shape:
            start, stop, _ = rows.indices(shape[0])
            shape = (max(stop - start, 0), *shape[1:])
        tensor = torch.empty(shape, dtype=entry.dtype)
        skipped = start * math.prod(shape[1:]) * entry.dtype.itemsize
        with _reading(entry.file, name) as stream:
            stream.seek(entry.offset + skipped)
            _fill(stream, _bytes(tensor), entry.file, name)
        return tensor

    def sha256(self, name: str) -> str:
        """sha256 (hex) of the tensor's bytes as stored, row by row; the same in either file format.

        Raises CheckpointError as `read` does.
        """
        entry = self.tensors[name]
        if entry.offset is None:
            return hashlib.sha256(_bytes(_torch_tensor(entry.file, name).contiguous())).hexdigest()
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_HASH_CHUNK))
        left = math.prod(entry.shape) * entry.dtype.itemsize
        with _reading(entry.file, name) as stream:
            stream.seek(entry.offset)
            while left:
                chunk = buffer[: min(left, _HASH_CHUNK)]
                _fill(stream, chunk, entry.file, name)
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face model folder or one weight file, reading headers only.

    A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`, or the same for
    `pytorch_model.bin`; safetensors goes first where both are there. A file is a `.safetensors` or a torch
    `.bin`. The config is the `config.json` of the folder, also for a single file in it; None without one.

    Raises CheckpointError: nothing there, no weights in the folder, a truncated or corrupt file, a .bin that
    holds code, a missing shard, an index that names a tensor its shard lacks, a config.json that is no JSON
    object.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a Hugging Face model folder or a .safetensors file"
        )
    if path.is_dir():
        return Checkpoint(path, _read_folder(path), _read_config(path))
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(
            f"{path}: neither a folder nor a .safetensors or .bin file; give the model's folder or its weight file"
        )
    return Checkpoint(path, _read_header(path), _read_config(path.parent))


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    for file in SINGLE_FILES:
        if (folder / file).is_file():
            return _read_header(folder / file)
        if (folder / f"{file}{INDEX_SUFFIX}").is_file():
            return _read_shards(folder / f"{file}{INDEX_SUFFIX}")
    found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    raise CheckpointError(
        f"{folder}: no weights here: neither {' nor '.join(SINGLE_FILES)}, nor their {INDEX_SUFFIX[1:]}; "
        f"found {_some(found, 12) or 'an empty folder'}. Give the folder or the weight file itself"
    )


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: no `weight_map` from tensor to shard in it; download the index again")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        names = [name for name, file in weight_map.items() if file == shard]
        # An index is data from somewhere else: it may not point outside its own folder.
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not in the index's own folder")
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(
                f"{file}: shard is missing; {index.name} expects {len(names)} tensors in it: {_some(names)}. "
                f"Download it again"
            )
        header = _read_header(file)
        lacking = [name for name in names if name not in header]
        if lacking:
            raise CheckpointError(
                f"{file}: {index.name} expects {_some(lacking)} in this shard, which lacks "
                f"{'them' if len(lacking) > 1 else 'it'}; index and shards are not of one download"
            )
        tensors.update((name, header[name]) for name in names)
    return {name: tensors[name] for name in weight_map}


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        if file.suffix == ".bin":
            return {
                name: TensorEntry(file, tensor.dtype, tuple(tensor.shape), None)
                for name, tensor in _torch_load(file).items()
            }
        return _read_safetensors_header(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _read_safetensors_header(file: Path) -> dict[str, TensorEntry]:
    try:
        # safetensors checks sizes, offsets, overlaps and the file's length; what follows relies on that.
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: truncated or corrupt safetensors file ({error}){_what_it_is(file)}") from error
    header.pop("__metadata__", None)
    return {
        name: TensorEntry(
            file,
            _DTYPES.get(record["dtype"], torch.uint8),
            tuple(record["shape"]),
            8 + length + record["data_offsets"][0],
        )
        for name, record in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _torch_tensor(file: Path, name: str) -> Tensor:
    try:
        return _torch_load(file)[name].detach()
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: the file changed since it was opened") from error


def _torch_load(file: Path) -> Mapping[str, Tensor]:
    with file.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    if zipped:
        return _torch_load_checked(file, mmap=True)
    return _torch_load_old(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _torch_load_old(file: Path, modified: int) -> Mapping[str, Tensor]:
    return _torch_load_checked(file, mmap=False)


def _torch_load_checked(file: Path, mmap: bool) -> Mapping[str, Tensor]:
    try:
        state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        # torch raises whatever its unpickler met; a hostile file and a broken one look alike.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{file}: corrupt, or holds pickled objects other than tensors, which are never run ({reason})"
            f"{_what_it_is(file)}. Use the model's .safetensors file, or save its state_dict again"
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{file}: holds a {type(state_dict).__name__}, not a state_dict of tensors")
    strange = [
        f"{name} ({type(value).__name__})" for name, value in state_dict.items() if not isinstance(value, Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"{file}: not a state_dict of tensors: it holds {_some(strange)}; save model.state_dict()"
        )
    return {str(name): tensor for name, tensor in state_dict.items()}


def _read_config(folder: Path) -> Mapping[str, Any] | None:
    config = folder / "config.json"
    return _read_json(config) if config.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a JSON {type(content).__name__}, not an object; download it again")
    return content


@contextlib.contextmanager
def _reading(file: Path, name: str) -> Iterator[io.FileIO]:
    try:
        with io.FileIO(file) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {name}: {error.strerror or error}") from error


def _fill(stream: io.FileIO, buffer: memoryview, file: Path, name: str) -> None:
    while buffer:
        count = stream.readinto(buffer)
        if not count:
            raise CheckpointError(f"{file}: ends within {name}; the file changed since it was opened")
        buffer = buffer[count:]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _what_it_is(file: Path) -> str:
    with file.open("rb") as stream:
        if stream.read(19) == b"version https://git":
            return "; this is a Git LFS pointer, not the weights: run `git lfs pull`"
    return ""


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
