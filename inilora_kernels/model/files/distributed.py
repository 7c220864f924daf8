"""Folders of torch.distributed.checkpoint (DCP), as FSDP and Lightning write them, by torch's own reader.

torch unpickles a folder's `.metadata` whatever it holds; here only the classes of torch's own description are allowed.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import threading
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...storage.reading import empty_tensor, opened, require_regular
from .tensor import tensor_sha256
from .torch_file import STATE_DICTS

METADATA = ".metadata"

_SAFE_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_SAFE_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}

AnyKind = TypeVar("AnyKind")


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor of a DCP folder; see `StoredTensor`. It may be split among several files, and is read whole."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: None = None

    def read(self, rows: slice = slice(None)) -> Tensor:
        checkpoint: Any = importlib.import_module("torch.distributed.checkpoint")
        whole = empty_tensor(self.file, self.name, self.shape, self.dtype)
        try:
            with _quiet():
                checkpoint.load({self.name: whole}, storage_reader=_reader(self.file), no_dist=True)
        except BaseException as error:
            # torch's own kind of error here is no Exception, and its first line is a rank's traceback.
            failures = getattr(error, "failures", {})
            if not failures and not isinstance(error, Exception):
                raise
            reason = _reason(next(iter(failures.values()))[0] if failures else error)
            raise CheckpointError(
                f"{self.file}: cannot read {self.name} ({reason}); its .distcp files are damaged, write them again"
            ) from error
        return whole[rows].clone() if whole.ndim and rows != slice(None) else whole

    def sha256(self) -> str:
        return tensor_sha256(self.read())


def open_distributed(folder: Path) -> dict[str, DistributedTensor]:
    """The tensors of a DCP folder by name; of one that holds more than a model, the model's. Raises CheckpointError."""
    described: Any = importlib.import_module("torch.distributed.checkpoint.metadata")
    for part in sorted(folder.glob("*.distcp")):
        require_regular(part)
    try:
        metadata = _reader(folder).read_metadata()
        tensors = {
            name: DistributedTensor(name, folder, _of_kind(entry.properties.dtype, torch.dtype), _shape(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, described.TensorStorageMetadata)
        }
        return {name: tensors[key] for name, key in _of_model(tensors, metadata.planner_data).items()}
    except Exception as error:
        raise CheckpointError(
            f"{folder / METADATA}: damaged, or holds more than torch's description of tensors ({_reason(error)}); "
            f"write the checkpoint again"
        ) from error


def _of_model(keys: Collection[str], paths: Any) -> dict[str, str]:
    """The key of each of the model's tensors, by its name in the model.

    paths: where each was in the nested dict that was saved: ("model", "layers.0.weight") as accelerate does, next to an
        optimizer's ("optimizer", "state", "layers.0.weight", "exp_avg") as torch's own examples do.
    """
    places = paths if isinstance(paths, dict) else {}
    nested = {key: place for key in keys if isinstance(place := places.get(key), tuple) and len(place) > 1}
    plain = {key: key for key in keys if key not in nested}
    if plain or not nested:
        return plain
    dicts = {place[:-1] for place in nested.values() if place[-2] in STATE_DICTS}
    if len(dicts) != 1:
        return {key: key for key in keys}
    (chosen,) = dicts
    return {str(place[-1]): key for key, place in nested.items() if place[:-1] == chosen}


def _shape(size: Any) -> tuple[int, ...]:
    return tuple(_of_kind(side, int) for side in _of_kind(size, torch.Size))


def _of_kind(value: Any, kind: type[AnyKind]) -> AnyKind:
    """The value, if it is of this kind: a damaged pickle holds anything."""
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or module in _SAFE_MODULES or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in it")


def _reader(folder: Path) -> Any:
    filesystem: Any = importlib.import_module("torch.distributed.checkpoint.filesystem")
    described: Any = importlib.import_module("torch.distributed.checkpoint.metadata")

    class Reader(filesystem.FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with opened(folder / METADATA) as stream:
                metadata = _Unpickler(stream).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = described.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


# Two threads' filters would be put back in the wrong order, and warnings be silenced for good.
_filtering = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that it reads in one process, which is intended here; by one thread at a time."""
    with _filtering, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
