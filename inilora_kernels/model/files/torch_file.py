"""Files that torch.save wrote: .bin, .pt, .pth, and Lightning's .ckpt. Only ever loaded with `weights_only=True`.

A file in torch's format since 1.6 is memory-mapped for each read and closed again; a file in the older format is loaded
whole, and the last one is kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, is_out_of_memory
from ...storage.reading import opened, reporting, require_stored
from ...suggestions import some
from .tensor import tensor_sha256, what_it_is

# Where trainers put the model's state_dict when the file holds more: Lightning, open_clip, timm, DeepSpeed.
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")


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
        if not self.type:
            require_stored(stored, self.file, self.name)
        return stored


def open_torch_file(file: Path) -> dict[str, TorchTensor]:
    """The tensors of a torch file by name. Raises CheckpointError, also if the file holds code, and OSError."""
    return {
        name: TorchTensor(name, file, tensor.dtype, tuple(tensor.shape), _type(tensor))
        for name, tensor in _load(file).items()
    }


def _type(tensor: Tensor) -> str:
    own = type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
    return "" if own else type(tensor).__name__


def _load(file: Path) -> Mapping[str, Tensor]:
    with opened(file) as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    if zipped:
        return _load_checked(file, mmap=True)
    return _load_old(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load_old(file: Path, modified: int) -> Mapping[str, Tensor]:
    return _load_checked(file, mmap=False)


def _load_checked(file: Path, mmap: bool) -> Mapping[str, Tensor]:
    try:
        content = _torch_load(file, mmap)
    except Exception as error:
        if is_out_of_memory(error):
            raise CheckpointError(
                f"{file}: not enough memory to map or read it; free some, or raise its limit"
            ) from error
        # torch raises whatever its unpickler meets; a hostile file and a broken one look alike.
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
    return {str(name): tensor for name, tensor in state_dict.items()}


def _torch_load(file: Path, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:
        # torchao's quantized tensors are safe to load once torchao has registered its classes.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if mmap else []
        if not unknown or not all(name.startswith(("torchao.", "torch.")) for name in unknown):
            raise
        importlib.import_module("torchao")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _state_dict(content: dict[Any, Any]) -> dict[Any, Any]:
    if all(isinstance(value, Tensor) for value in content.values()):
        return content
    for key in _STATE_DICTS:
        inner = content.get(key)
        if isinstance(inner, dict) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return content
