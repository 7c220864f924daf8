"""Copy a model's folder with a few weights changed, strip by strip; memory holds some rows of one tensor."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

from torch import Tensor

from ..errors import CheckpointError, WeightError
from ..model.checkpoint import Checkpoint
from ..model.files.distributed import DistributedTensor
from ..model.files.safetensors import open_safetensors, write_empty_safetensors
from ..model.files.tensor import StoredTensor, tensor_bytes
from ..model.layout import NAMED_WEIGHTS, read_weight_map
from ..model.location import TORCH_SUFFIXES
from ..model.residual import RESIDUAL_RECORD
from ..storage.atomic import save_tensors
from ..storage.reading import MOST_JSON, absolute, is_there, opened, read_bytes, read_json, reporting
from ..suggestions import some

# (index of the first row, rows as stored) ↦ the new rows, in the same shape and dtype.
Change = Callable[[int, Tensor], Tensor]

# Other copies of a model's weights, adapters, other programs' files, and our own record of another folder: a changed
# model must not carry them along.
_LEFT_BEHIND = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|distcp|h5|msgpack|onnx|onnx_data|gguf|pb|ot|tflite|npz)(\.index(\.[\w-]+)?\.json)?|\..*"
    rf"|optimizer_\d+|adapter_config\.json|{re.escape(RESIDUAL_RECORD)}"
)
# Where huggingface_hub keeps the files that a download's folder links to.
_HUB_BLOB = re.compile(r".*[/\\]models--[^/\\]+[/\\]blobs[/\\][^/\\]+")
_STRIP_BYTES = 1 << 20


def copy_model(
    checkpoint: Checkpoint,
    folder: Path,
    changes: Mapping[str, Change],
    untied: Mapping[str, Tensor | str] | None = None,
) -> None:
    """Copy a model's folder: config, tokenizer and whatever else is there, and its weights, some of them changed.

    changes: by the tensor's name.
    untied: tensors to add, by name: their values, or the name of the unchanged tensor that the model has shared with
        them so far. config.json then says that nothing is shared.

    A safetensors shard is copied as a file and then overwritten in the places of the changed tensors, so everything
    else stays the same to the byte. A torch file becomes safetensors, as does a distributed checkpoint. Memory holds a
    strip of one tensor; of a distributed checkpoint one tensor.

    Raises CheckpointError for a single file, weights in another folder than the config, other kinds of file, and a
    folder that holds links to folders, pipes or devices.
    """
    source = checkpoint.path
    size_of_copy(checkpoint)
    shards, in_place = _shards(checkpoint)
    folder.mkdir(exist_ok=True)
    copied = list(_copied(source, shards))
    _warn_of_links_out(source, copied)
    for path in copied:
        # Not the modes: a read-only model's copy is written to. They follow the umask.
        target = folder / path.relative_to(source)
        target.mkdir() if path.is_dir() else shutil.copyfile(path, target)
    write = _overwrite if in_place else _rewrite
    files = write(checkpoint, shards, folder, changes)
    if untied:
        _untie(checkpoint, folder, files, untied)


def size_of_copy(checkpoint: Checkpoint) -> int:
    """The bytes that `copy_model` will write, without the untied tensors. Raises CheckpointError where it would."""
    source = checkpoint.path
    shards, _ = _shards(checkpoint)
    with reporting(source):
        return sum(map(_size, checkpoint.tensors.values())) + sum(map(_size_of_copied, _copied(source, shards)))


def _copied(source: Path, shards: Collection[Path]) -> Iterator[Path]:
    """The files and folders to copy beside the weights, a folder before what is in it."""
    parts = _parts_of_sentence_transformers(source)
    for where, folders, files in os.walk(source, onerror=_raise):
        kept = [
            name
            for name in (*folders, *files)
            if Path(where, name) not in shards and not _is_left_behind(source, parts, Path(where), name)
        ]
        yield from (Path(where) / name for name in kept)
        folders[:] = [name for name in folders if name in kept]


def _raise(error: OSError) -> NoReturn:
    raise error


def _shards(checkpoint: Checkpoint) -> tuple[list[Path], bool]:
    """The weight files to copy, and whether they can be changed in place. Raises CheckpointError."""
    source = checkpoint.path
    if not source.is_dir():
        raise CheckpointError(f"{source}: a single file; give the model's folder, with its config and tokenizer")
    shards = sorted({entry.file for entry in checkpoint.tensors.values()})
    # A distributed checkpoint is a folder itself: the model's own, or one in it.
    elsewhere = next((shard.parent for shard in shards if source not in (shard, shard.parent)), None)
    if elsewhere is not None:
        raise CheckpointError(f"{source}: its weights are in {elsewhere}; give that folder as the base")
    in_place = all(shard.suffix == ".safetensors" for shard in shards)
    if not in_place and not all(shard.suffix in TORCH_SUFFIXES or shard.is_dir() for shard in shards):
        raise CheckpointError(
            f"{shards[0]}: neither safetensors nor a torch file; save the model with save_pretrained first"
        )
    return shards, in_place


def _is_left_behind(source: Path, parts: Collection[str], where: Path, name: str) -> bool:
    own = where.name in parts and where.parent == source
    return not own and bool(_LEFT_BEHIND.fullmatch(name))


def _size_of_copied(path: Path) -> int:
    """The size of a file, 0 of a folder. Refuses what cannot be read, and what a copy would not come back from: a link
    to a folder may lead into a loop, and a pipe has no end."""
    if path.is_dir() and path.is_symlink():
        raise CheckpointError(f"{path}: a link to a folder, which is not followed; remove it or put the folder there")
    if not (path.is_dir() or path.is_file()):
        raise CheckpointError(f"{path}: not a regular file, or a link that leads nowhere; remove it from the folder")
    if path.is_dir():
        return 0
    with opened(path) as stream:
        return os.fstat(stream.fileno()).st_size


def _warn_of_links_out(source: Path, copied: Iterable[Path]) -> None:
    """Warn of files that lie elsewhere: a model from a stranger may link to what is nobody's business."""
    ends = {path.name: absolute(path) for path in copied if path.is_symlink()}
    out = [
        f"{name} → {end}"
        for name, end in ends.items()
        if not (end.is_relative_to(absolute(source)) or _HUB_BLOB.fullmatch(str(end)))
    ]
    if out:
        warnings.warn(
            f"{source}: {some(out)}: links out of the model's folder, whose files are copied into the new model's",
            stacklevel=4,
        )


def _parts_of_sentence_transformers(folder: Path) -> frozenset[str]:
    """The folders of further layers (`2_Dense`) that belong to the model and have their own weights."""
    file = folder / "modules.json"
    try:
        modules = json.loads(read_bytes(file, most=MOST_JSON)) if is_there(file) else []
        return frozenset(module["path"] for module in modules if module["path"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: not the list of a sentence-transformers model's parts ({error})") from error


def _overwrite(
    checkpoint: Checkpoint, shards: list[Path], folder: Path, changes: Mapping[str, Change]
) -> dict[str, str]:
    """Copy the shards and overwrite the changed tensors in place. Returns the file of each tensor."""
    for shard in shards:
        shutil.copyfile(shard, folder / shard.name)
    indexes = [
        index
        for index in checkpoint.path.glob("*.safetensors.index*.json")
        if shards[0].name in read_weight_map(index).values()
    ]
    for index in indexes:
        shutil.copyfile(index, folder / index.name)
    for name, change in changes.items():
        entry = checkpoint.tensors[name]
        assert entry.offset is not None
        with (folder / entry.file.name).open("r+b") as stream:
            _fill(stream, entry.offset, checkpoint, name, change)
    files = {name: entry.file.name for name, entry in checkpoint.tensors.items()}
    if len(shards) > 1 and not indexes:  # transformers loads no shards without one
        _write_index(checkpoint, folder, files)
    return files


def _rewrite(checkpoint: Checkpoint, shards: list[Path], folder: Path, changes: Mapping[str, Change]) -> dict[str, str]:
    """Write the contents of torch's files and folders as safetensors. Returns the file of each tensor."""
    files: dict[str, str] = {}
    for place, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{place:05}-of-{len(shards):05}"
        file = f"{_stem(checkpoint)}{part}.safetensors"
        entries = {name: entry for name, entry in checkpoint.tensors.items() if entry.file == shard}
        write_empty_safetensors(folder / file, entries)
        with (folder / file).open("r+b") as stream:
            for name, new in open_safetensors(folder / file)[0].items():
                _fill(stream, new.offset, checkpoint, name, changes.get(name))
        files.update(dict.fromkeys(entries, file))
    if len(shards) > 1:
        _write_index(checkpoint, folder, files)
    return files


def _fill(stream: IO[bytes], offset: int, checkpoint: Checkpoint, name: str, change: Change | None) -> None:
    """Write a tensor at its place in a file, changed or as it is, strip by strip."""
    stream.seek(offset)
    for start, strip in _strips(checkpoint, name):
        stream.write(tensor_bytes(strip if change is None else _checked(change, name, start, strip)))


def _untie(checkpoint: Checkpoint, folder: Path, files: Mapping[str, str], untied: Mapping[str, Tensor | str]) -> None:
    """Give each of these names a tensor of its own, in a shard of its own, and say so in config.json."""
    files = dict(files)
    if "model.safetensors" in files.values():  # with a file of this name, transformers looks at no index
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        files = dict.fromkeys(files, "model-00001-of-00002.safetensors")
        extra = "model-00002-of-00002.safetensors"
    else:
        extra = "model-untied.safetensors"
    tensors = {
        name: value if isinstance(value, Tensor) else checkpoint.tensors[value].read() for name, value in untied.items()
    }
    save_tensors(folder / extra, {name: tensor.contiguous() for name, tensor in tensors.items()})
    _write_index(checkpoint, folder, {**files, **dict.fromkeys(untied, extra)}, sum(t.nbytes for t in tensors.values()))
    config = read_json(folder / "config.json")
    config["tie_word_embeddings"] = False
    config.pop(NAMED_WEIGHTS, None)  # the index names the weights now
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(checkpoint: Checkpoint, folder: Path, files: Mapping[str, str], added: int = 0) -> None:
    size = sum(_size(entry) for entry in checkpoint.tensors.values()) + added
    index = {"metadata": {"total_size": size}, "weight_map": dict(files)}
    file = folder / f"{_stem(checkpoint)}.safetensors.index.json"
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stem(checkpoint: Checkpoint) -> str:
    """What diffusers or transformers calls a model's weight file."""
    diffusers = any(entry.file.name.startswith("diffusion_pytorch_model") for entry in checkpoint.tensors.values())
    return "diffusion_pytorch_model" if diffusers else "model"


def _strips(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    shape = checkpoint.tensors[name].shape
    if not shape:
        yield 0, checkpoint.tensors[name].read()
        return
    tensor = checkpoint.tensors[name]
    if isinstance(tensor, DistributedTensor):  # which would be read whole for each strip
        yield 0, tensor.read()
        return
    step = max(1, _STRIP_BYTES * shape[0] // max(1, _size(tensor)))
    for start in range(0, shape[0], step):
        yield start, tensor.read(slice(start, start + step))


def _checked(change: Change, name: str, start: int, rows: Tensor) -> Tensor:
    new = change(start, rows).contiguous()
    assert (new.shape, new.dtype) == (rows.shape, rows.dtype), name
    if new.is_floating_point() and rows.isfinite().all() and not new.isfinite().all():
        raise WeightError(
            f"{name}: the new weight is not finite in {new.dtype}: the sum leaves its range, or the factors or the "
            f"trained adapter hold NaN; check them, or use the model in a wider dtype"
        )
    return new


def _size(entry: StoredTensor) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize
