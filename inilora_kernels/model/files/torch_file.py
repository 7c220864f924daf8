"""Files that torch.save wrote: .bin, .pt, .pth, and Lightning's .ckpt. Only ever loaded with `weights_only=True`.

Of a file in torch's format since 1.6, a zip archive, the description alone is read; a tensor is then read from its
place in the archive. Tensors that are not stored row by row are taken from a memory map of the whole file. A file in
the older format is loaded whole, and the last one is kept; one that is larger than the free memory is refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import struct
import sys
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, is_out_of_memory
from ...memory import free_memory
from ...storage.reading import opened, reporting, require_stored
from ...suggestions import some
from .tensor import ContiguousTensor, tensor_sha256, what_it_is

# What a zip archive has before a record's name, its extra field and its bytes; it ends with the lengths of those two.
_LOCAL_HEADER = struct.Struct("<26xHH")

# Where trainers put the model's state_dict when the file holds more: Lightning, open_clip, timm, DeepSpeed.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in a file of torch.save; see `StoredTensor`.

    type: the class of a tensor that is not one of torch's own, such as torchao's, which are read dequantized;
        "" otherwise.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    type: str = ""
    offset: None = None

    def read(self, rows: slice = slice(None)) -> Tensor:
        stored = self._stored()
        if self.type:
            stored = stored.dequantize()
        with reporting(self.file):
            return (stored[rows] if stored.ndim else stored).clone(memory_format=torch.contiguous_format)

    def sha256(self) -> str:
        stored = self._stored()
        if not self.type:
            return tensor_sha256(stored)
        parts, context = stored.__tensor_flatten__()  # type: ignore[attr-defined]
        lines = [str(context), *(f"{part} {tensor_sha256(getattr(stored, part))}" for part in parts)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _stored(self) -> Tensor:
        try:
            stored = _load(self.file)[self.name].detach()
        except KeyError as error:
            raise CheckpointError(
                f"{self.file}: cannot read {self.name}: the file has changed since it was opened"
            ) from error
        if self.type:
            return stored
        require_stored(stored, self.file, self.name)
        # What torch marks as a conjugate or a negative of its values.
        return stored.resolve_conj().resolve_neg()


def open_torch_file(file: Path) -> dict[str, ContiguousTensor | TorchTensor]:
    """The tensors of a torch file by name. Raises CheckpointError, also if the file holds code, and OSError."""
    if not _is_zip(file):
        _require_memory(file)
        return {name: _mapped(name, file, tensor) for name, tensor in _load(file).items()}
    records = _records(file)
    try:
        # torch swaps bytes also where there are none, and crashes.
        described = _load_checked(file, "meta") if records else _load(file)
    except CheckpointError:
        # Tensors that torch has quantized cannot be described without their values.
        described = _load(file)
    return {
        name: _in_place(name, file, tensor, records) or _mapped(name, file, tensor)
        for name, tensor in described.items()
    }


def _type(tensor: Tensor) -> str:
    own = type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
    return "" if own else type(tensor).__name__


def _mapped(name: str, file: Path, tensor: Tensor) -> TorchTensor:
    return TorchTensor(name, file, tensor.dtype, tuple(tensor.shape), _type(tensor))


def _in_place(name: str, file: Path, tensor: Tensor, records: Mapping[int, int]) -> ContiguousTensor | None:
    """A tensor that was loaded to the meta device, by its place in the file; None if its values are not there as such.

    records: the size of each record of the archive by the offset of its bytes.
    """
    plain = not (_type(tensor) or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    if not (plain and tensor.layout == torch.strided and tensor.is_contiguous()):
        return None
    # torch sets it on what it loads to the meta device; tensors that were saved there have none.
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    first = tensor.storage_offset() * tensor.dtype.itemsize
    if start is None or first + tensor.nbytes > records.get(start, -1):
        return None
    return ContiguousTensor(name, file, tensor.dtype, tuple(tensor.shape), start + first)


def _records(file: Path) -> dict[int, int]:
    """The sizes of the archive's records by the offsets of their bytes. Empty if those are in another byte order.

    Raises CheckpointError if one is compressed: torch.save compresses none, and a map of the file would be of something
    else.
    """
    records: dict[int, int] = {}
    try:
        with opened(file) as stream, zipfile.ZipFile(stream) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{file}: {record.filename} is compressed in it, which torch.save does not do; load the file "
                        f"with torch and save its state_dict again"
                    )
                if record.filename.endswith("byteorder") and (
                    record.file_size > 6 or archive.read(record).decode() != sys.byteorder
                ):
                    return {}
                stream.seek(record.header_offset)
                header = stream.read(_LOCAL_HEADER.size)
                if len(header) == _LOCAL_HEADER.size:
                    name, extra = _LOCAL_HEADER.unpack(header)
                    records[record.header_offset + _LOCAL_HEADER.size + name + extra] = record.file_size
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
        # A damaged archive, which torch then says more about.
        return {}
    return records


def _is_zip(file: Path) -> bool:
    with opened(file) as stream:
        return stream.read(4) == b"PK\x03\x04"


def _load(file: Path) -> Mapping[str, Tensor]:
    if _is_zip(file):
        return _load_checked(file, "cpu", mmap=True)
    with _loading:
        return _load_old(file, file.stat().st_mtime_ns)


def _require_memory(file: Path) -> None:
    """Raise CheckpointError for a file of the older format that is larger than the memory that is free."""
    size, free = file.stat().st_size, free_memory()
    if size > free:
        raise CheckpointError(
            f"{file}: in torch's format before 1.6, which can only be read whole: {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; take the model's .safetensors file, or save the file again with "
            f"a newer torch where it fits"
        )


# Several threads that miss at once would each load a whole file.
_loading = threading.Lock()


@functools.lru_cache(maxsize=1)
def _load_old(file: Path, modified: int) -> Mapping[str, Tensor]:
    return _load_checked(file, "cpu")


def _load_checked(file: Path, device: str, mmap: bool = False) -> Mapping[str, Tensor]:
    try:
        content = _torch_load(file, device, mmap)
    except Exception as error:
        if is_out_of_memory(error):
            raise CheckpointError(
                f"{file}: not enough memory to map or read it; free some, or raise its limit"
            ) from error
        # torch raises whatever its unpickler meets; a hostile file and a broken one look alike.
        refers = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        if refers:
            raise CheckpointError(
                f"{file}: holds pickled objects other than tensors, which are never run ({refers[1]}); where you trust "
                f"it, load it with torch.load(…, weights_only=False) and save the model by save_pretrained, or its "
                f"state_dict"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{file}: corrupt, or holds pickled objects other than tensors, which are never run ({reason})"
            f"{what_it_is(file)}. Use the model's .safetensors file, or save its state_dict again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a state_dict of tensors")
    state_dict = _state_dict(content)
    strange = [
        f"{name} ({type(value).__name__})"
        for name, value in state_dict.items()
        if not isinstance(value, Tensor) or value.is_nested
    ]
    if strange:
        raise CheckpointError(f"{file}: not a state_dict of tensors: it holds {some(strange)}; save model.state_dict()")
    names = [str(name) for name in state_dict]
    unwritable = next((name for name in names if not _is_text(name)), None)
    if unwritable is not None:
        raise CheckpointError(f"{file}: the name {unwritable!r} is no text that a file can hold; rename that tensor")
    return dict(zip(names, state_dict.values(), strict=True))


def _is_text(name: str) -> bool:
    """Whether a name can be written: a pickle may hold half of a character."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _torch_load(file: Path, device: str, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except Exception:
        # torchao's quantized tensors are safe to load once torchao has registered its classes.
        zipped = mmap or device == "meta"
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        if not unknown or not all(name.startswith(("torchao.", "torch.")) for name in unknown):
            raise
        importlib.import_module("torchao")
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)


def _state_dict(content: dict[Any, Any]) -> dict[Any, Any]:
    if all(isinstance(value, Tensor) for value in content.values()):
        return content
    for key in STATE_DICTS:
        inner = content.get(key)
        if isinstance(inner, dict) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return content
