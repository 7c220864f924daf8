"""Checkpoints: which tensors and weights one holds, and how to read them one at a time.

Opening a checkpoint reads headers only. A tensor is then read from disk into its own memory, so that the peak is one
tensor; quantized weights are dequantized one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.threads import side_by_side
from ..storage.factor_file import METADATA_KEY
from ..storage.reading import absolute, reporting, require_regular
from ..suggestions import some
from .config import read_config
from .files.distributed import open_distributed
from .files.gguf import open_gguf
from .files.safetensors import open_safetensors
from .files.tensor import StoredTensor, blocks_of, size_of
from .files.torch_file import open_torch_file
from .formats.find import find_weights
from .formats.weight import StoredWeight
from .hashes import Hashed, hash_in_lanes, in_lanes
from .hub import Choose, fetch
from .layout import Component, find_components
from .location import TORCH_SUFFIXES, located
from .names import adapter_among

# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors as stored, the weights that they make up, and config.json where there is one.

    tensors: by name; in a pipeline, prefixed with the component's name ("unet.").
    weights: by the parameter's name in the model; in a plain checkpoint, the tensor of that name.
    name: how to name it as a base model: its hub id, or its absolute path.
    absent: names of tensors in shards that were not downloaded because nothing needed them.

    >>> import tempfile, torch
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
    tensors: Mapping[str, StoredTensor]
    weights: Mapping[str, StoredWeight]
    config: Mapping[str, Any] | None
    name: str = ""
    absent: tuple[str, ...] = ()

    @property
    def wrapper(self) -> str:
        """What a wrapper put before every name in the file, and `tensors` leaves out: "module." or "_orig_mod."."""
        for name, tensor in self.tensors.items():
            before = tensor.name.removesuffix(name) if tensor.name.endswith(name) else ""
            return before if before.startswith(_WRAPPERS) else ""
        return ""

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The values of a weight, dequantized if it is quantized, or of any other tensor; all of them or some rows.

        In its own memory and contiguous. Raises CheckpointError if the file has changed or vanished.
        """
        weight = self.weights.get(name)
        return weight.read(rows) if weight is not None else self.tensors[name].read(rows)

    def sha256(self, name: str) -> str:
        """sha256 (hex) of a weight's stored bytes, including its scales if it is quantized, or of a tensor's.

        Raises CheckpointError, as `read` does.
        """
        weight = self.weights.get(name)
        return weight.sha256() if weight is not None else self.tensors[name].sha256()

    def hash_each(self, names: Collection[str], found: Callable[[str, str], None]) -> None:
        """Call `found` with each name and its `sha256`, in any order and from any thread; what that raises ends it."""
        threads = torch.get_num_threads()
        whole: dict[str, Hashed] = {}
        for name in names:
            weight = self.weights.get(name)
            stored = self.tensors[name] if weight is None else weight.plain
            if stored is not None and (blocks := blocks_of(stored)) is not None:
                whole[name] = Hashed(name, size_of(stored.shape, stored.dtype), blocks)
        if lanes := in_lanes(list(whole.values()), threads):
            hash_in_lanes(list(whole.values()), lanes, threads, found)
        else:
            with closing(side_by_side(self.sha256, list(whole), threads)) as hashes:
                for name, sha256 in zip(whole, hashes, strict=True):
                    found(name, sha256)
        # Any other is whole in memory meanwhile, or its reader is not for several threads.
        for name in names:
            if name not in whole:
                found(name, self.sha256(name))


def open_checkpoint(
    path: str | Path, revision: str | None = None, token: str | None = None, choose: Choose | None = None
) -> Checkpoint:
    """Open a model's folder, one weight file, or a model on the Hugging Face hub, reading headers only.

    A folder may hold its weights under any name that Hugging Face's libraries, their variants or trainers use;
    safetensors comes first. A file is a `.safetensors`, a `.gguf`, or what torch.save wrote. The config is the folder's
    `config.json`, even for a single file in it; None without one.

    path: a folder or file, or an id such as "org/name", optionally followed by "@revision".
    revision, token: for the hub; huggingface_hub's defaults, offline mode and cache apply.
    choose: for a sharded model on the hub, the tensors that will be read, so that other shards are not downloaded; None
        downloads the whole model with its tokenizer.

    Raises CheckpointError if the path does not exist, a folder has no weights, a file is truncated or corrupt or holds
    code, a shard is missing or lacks a tensor of the index, or config.json is not a JSON object.
    """
    folder, name, kept = located(path), "", None
    if not os.path.exists(folder) or revision is not None:
        download = fetch(folder, revision, token, choose)
        folder, name, kept = download.folder, download.name, download.files
    with reporting(folder):
        components = find_components(folder, kept)
        parts = [_open_component(component) for component in components]
    alone = len(parts) == 1 and not components[0].name
    whole = parts[0] if alone else _together(folder, components, parts)
    return replace(whole, path=folder, name=name or str(absolute(folder)))


def _open_component(component: Component) -> Checkpoint:
    """One model of a layout; names are those in its files."""
    config = read_config(component.config) if component.config is not None else None
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    of_shard: dict[str, list[str]] = {}
    for name, shard in (component.weight_map or {}).items():
        of_shard.setdefault(shard, []).append(name)
    for file in component.files:
        found, own_metadata, own_config = _open_file(file)
        if component.weight_map is not None:
            _require_shard_of_index(file, component, of_shard[file.name], found)
        twice = [name for name in found if name in tensors]
        if twice:
            raise CheckpointError(f"{file}: {some(twice)} are in another shard too; remove the copy")
        tensors.update(found)
        metadata.update(own_metadata)
        config = config or own_config
    if component.weight_map is not None:
        # In the index's order; behind it what the shards hold and the index forgot, which transformers loads too.
        tensors = {name: tensors[name] for name in (*component.weight_map, *tensors)}
    else:
        tensors = _without_wrappers(tensors)
    _refuse_adapters(component, tensors, metadata)
    weights = find_weights(tensors, config, metadata)
    return Checkpoint(component.folder, tensors, weights, config, absent=component.absent)


def _without_wrappers(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The names of the model itself, where a wrapper's state dict was saved."""
    for prefix in _WRAPPERS * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _refuse_adapters(component: Component, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    name = adapter_among(tensors)
    if name is None:
        return
    file = tensors[name].file
    if METADATA_KEY in metadata:
        raise CheckpointError(f"{file}: a factor file, not a model; give the model that it was computed from")
    if ".base_layer." in name:
        raise CheckpointError(
            f"{file}: a model with adapters in it, as PEFT names them ({name}); call merge_and_unload and save that, "
            f"or give the model without them"
        )
    raise CheckpointError(f"{file}: an adapter, not a model ({name}); give its base model")


def _open_file(file: Path) -> tuple[Mapping[str, StoredTensor], dict[str, str], dict[str, Any] | None]:
    """Its tensors, its metadata, and the config that it implies."""
    if file.is_dir():
        return open_distributed(file), {}, None
    require_regular(file)
    if file.suffix == ".gguf":
        found, config = open_gguf(file)
        return found, {}, config
    if file.suffix in TORCH_SUFFIXES:
        return open_torch_file(file), {}, None
    return *open_safetensors(file), None


def _require_shard_of_index(file: Path, component: Component, names: list[str], found: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a shard holds its tensors of the index, and none that the index has elsewhere."""
    lacking = [name for name in names if name not in found]
    if lacking:
        raise CheckpointError(
            f"{file}: {component.index} expects {some(lacking)} in this shard, which lacks "
            f"{'them' if len(lacking) > 1 else 'it'}; the index and the shards are not from the same download"
        )
    elsewhere = {*(component.weight_map or {}), *component.absent} - set(names)
    twice = [name for name in found if name in elsewhere]
    if twice:
        # transformers loads every tensor of every shard, and the last one stays.
        raise CheckpointError(
            f"{file}: {some(twice)} are in this shard too, and {component.index} has them in another; remove the copy"
        )


def _together(path: Path, components: Sequence[Component], parts: Sequence[Checkpoint]) -> Checkpoint:
    """A pipeline's models as one checkpoint, the names of each prefixed with its own."""
    tensors: dict[str, StoredTensor] = {}
    weights: dict[str, StoredWeight] = {}
    for component, part in zip(components, parts, strict=True):
        prefix = f"{component.name}."
        tensors.update((prefix + name, tensor) for name, tensor in part.tensors.items())
        weights.update((prefix + name, replace(weight, name=prefix + name)) for name, weight in part.weights.items())
    return Checkpoint(path, tensors, weights, None)
