"""Where a model's weights are: the files of a folder, under the names that libraries and trainers use."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError
from ..storage.factor_file import METADATA_KEY
from ..storage.reading import MOST_JSON, is_there, read_bytes, read_json
from ..suggestions import some
from .files.distributed import METADATA
from .files.safetensors import open_safetensors
from .location import WEIGHT_SUFFIXES

INDEX_SUFFIX = ".index.json"
# The entry of config.json that names the file that transformers loads, whatever else is there.
NAMED_WEIGHTS = "transformers_weights"

# transformers, diffusers, open_clip and the models' own authors; if several exist, the first one counts.
SINGLE_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
)

# The trainable parts of a diffusers pipeline: the denoiser and the text encoders, not the autoencoder.
_TRAINED = re.compile(r"transformer(_\d+)?|unet|prior|text_encoder(_\d+)?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<place>\d+)-of-(?P<count>\d+)(?P<variant>\.\w+)?\.(?P<suffix>safetensors|bin)")
_VARIANT = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)\.(?P<variant>(?![\w-]+-of-\d)[\w-]+)\.(safetensors|bin)"
)
_VARIANT_INDEX = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)\.\w+\.index\.(?P<variant>[\w-]+)\.json")


@dataclass(frozen=True)
class Component:
    """One model of a folder.

    name: the prefix of its tensors' names in a pipeline; "" for a model by itself.
    files: its weight files; a folder for a distributed checkpoint.
    config: its config.json, if there is one.
    index, weight_map: the name and content of the file that says which tensor is in which shard; None without one.
    absent: tensors in shards that were not downloaded.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    config: Path | None
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightFiles:
    """The names of a folder's weight files, or of the index that lists them."""

    files: tuple[str, ...]
    index: str | None = None


def find_components(path: Path, kept: Collection[str] | None = None) -> tuple[Component, ...]:
    """The models at a path, one or all of a pipeline's, and their files.

    kept: for a download, the files that were chosen, by their paths in the folder; None for all files.

    Raises CheckpointError if there are no weights, a shard is missing, or the folder holds something else.
    """
    if not os.path.isdir(path):
        if path.suffix not in WEIGHT_SUFFIXES:
            raise CheckpointError(
                f"{path}: neither a folder nor a .safetensors, .gguf, .bin, .pt, .pth or .ckpt file; give the model's "
                f"folder or its weight file"
            )
        shard = _SHARD.fullmatch(path.name)
        if shard and int(shard["count"]) > 1:
            warnings.warn(
                f"{path}: one of {int(shard['count'])} shards, each with a part of the model; give the folder for all",
                stacklevel=2,
            )
        return (Component("", path.parent, (path,), _config(path.parent)),)
    if is_there(path / "model_index.json"):
        return tuple(_pipeline(path, kept))
    component = _model(path, kept)
    if component is None:
        _refuse_adapter(path)
        inner = _sentence_transformer(path)
        component = _model(inner or path, _within(kept, inner.name) if inner else kept)
    if component is None:
        _refuse_deepspeed(path)
        raise _nothing(path)
    if component.config is not None and is_there(path / "adapter_config.json"):
        warnings.warn(
            f"{path}: adapter_config.json is beside the model, and transformers would load that adapter with it; the "
            f"model is taken alone. Move the adapter into a folder of its own",
            stacklevel=2,
        )
    return (component,)


def weight_files(names: Sequence[str], where: object, config: Path | None = None) -> WeightFiles | None:
    """Which files of a folder hold the weights, by name alone; None if none do. Raises CheckpointError.

    config: the folder's config.json, which may name one.
    """
    named = None if config is None else read_json(config).get(NAMED_WEIGHTS)
    if named is not None:
        if named not in names or not named.endswith((".safetensors", f".safetensors{INDEX_SUFFIX}")):
            raise CheckpointError(
                f"{where}: config.json has {NAMED_WEIGHTS} {named!r}, the file that transformers would load, and it is "
                f"no safetensors file of this folder; put it there, or take the entry out of config.json"
            )
        return WeightFiles((), named) if named.endswith(INDEX_SUFFIX) else WeightFiles((named,))
    for file in SINGLE_FILES:
        if file in names:
            if file == "consolidated.00.pth" and "consolidated.01.pth" in names:
                raise CheckpointError(
                    f"{where}: LLaMA's own weights in several parts, each with a piece of every matrix; convert them "
                    f"with transformers' convert_llama_weights_to_hf.py and give that folder"
                )
            return WeightFiles((file,))
        if f"{file}{INDEX_SUFFIX}" in names:
            return WeightFiles((), f"{file}{INDEX_SUFFIX}")
    return _variant(names, where) or _shards_without_index(names, where) or _only_file(names, where)


def variant_of(folder: Path) -> str | None:
    """What `from_pretrained` calls the variant of a folder's weights, "fp16" of `model.fp16.safetensors`."""
    found = weight_files(sorted(entry.name for entry in folder.iterdir()), folder)
    name = "" if found is None else found.index or found.files[0]
    match = _VARIANT.fullmatch(name) or _VARIANT_INDEX.fullmatch(name)
    return match["variant"] if match else None


def _model(folder: Path, kept: Collection[str] | None = None) -> Component | None:
    """The weights directly in a folder. kept: for a download, the files that were chosen; None for all."""
    config = _config(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    # A folder in place of an index is refused when that is read.
    here = [name for name in names if name.endswith(".json") or not (folder / name).is_dir()]
    found = weight_files(here, folder, config)
    found = found or _only_file([name for name in here if not _is_factor_file(folder / name)], folder)
    if found is None:
        return _distributed(folder, names, config)
    if found.index is None:
        return Component("", folder, tuple(folder / name for name in found.files), config)
    weight_map = read_weight_map(folder / found.index)
    held = {name: shard for name, shard in weight_map.items() if kept is None or shard in kept}
    for shard in sorted(set(held.values())):
        if not is_there(folder / shard):
            tensors = [name for name, file in held.items() if file == shard]
            raise CheckpointError(
                f"{folder / shard}: this shard is missing; {found.index} expects {len(tensors)} tensors in it: "
                f"{some(tensors)}. Download it again"
            )
    files = tuple(folder / shard for shard in sorted(set(held.values())))
    return Component(
        name="",
        folder=folder,
        files=files,
        config=config,
        index=found.index,
        weight_map=held,
        absent=tuple(name for name in weight_map if name not in held),
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, from an index. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: no `weight_map` from tensor to shard in it; download the index again")
    for shard in sorted(set(weight_map.values())):
        # An index is untrusted data: it may not point outside its own folder.
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not in the index's own folder")
    return weight_map


def _variant(names: Iterable[str], where: object) -> WeightFiles | None:
    """`model.fp16.safetensors` and the like, if there is nothing else and only one variant."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _VARIANT.fullmatch(name) or _VARIANT_INDEX.fullmatch(name)
        if match:
            found.setdefault(match["variant"], []).append(name)
    if len(found) > 1:
        files = [name for variant in found.values() for name in variant]
        raise CheckpointError(f"{where}: several variants of the weights ({some(files, 6)}); give one of the files")
    if not found:
        return None
    # safetensors before bin.
    name = sorted(next(iter(found.values())), key=lambda name: ".bin" in name)[0]
    return WeightFiles((), name) if name.endswith(".json") else WeightFiles((name,))


def _shards_without_index(names: Iterable[str], where: object) -> WeightFiles | None:
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return None
    if len({(match["stem"], match["count"], match["variant"], match["suffix"]) for match in shards}) > 1:
        raise CheckpointError(f"{where}: shards of more than one set of weights; keep only one set")
    places = {int(match["place"]): match[0] for match in shards}
    missing = [place for place in range(1, int(shards[0]["count"]) + 1) if place not in places]
    if missing:
        raise CheckpointError(
            f"{where}: shard {missing[0]} of {shards[0]['count']} is missing next to {shards[0][0]}, and no index "
            f"says what is in it; download the rest"
        )
    return WeightFiles(tuple(name for _, name in sorted(places.items())))


def _only_file(names: Iterable[str], where: object) -> WeightFiles | None:
    """A weight file of any name, if it is the only one of its kind."""
    for suffixes in ((".safetensors",), (".gguf",), (".ckpt", ".pth", ".pt")):
        files = [name for name in names if name.endswith(suffixes) and not name.startswith("adapter_model")]
        if len(files) == 1 and not _is_deepspeed(files[0]):
            return WeightFiles((files[0],))
        if len(files) > 1 and suffixes == (".gguf",):
            raise CheckpointError(f"{where}: several GGUF files ({some(files, 6)}); give one of them")
    return None


def _is_factor_file(file: Path) -> bool:
    """Whether this holds factors, which lie wherever a user has put them, also beside the model."""
    try:
        return file.suffix == ".safetensors" and METADATA_KEY in open_safetensors(file)[1]
    except CheckpointError:
        return False


def _distributed(folder: Path, names: Iterable[str], config: Path | None) -> Component | None:
    """A folder of torch.distributed.checkpoint, or the model's among those that FSDP trainers put into one."""
    found = [
        name for name in ("", *names) if is_there(folder / name / METADATA) and any((folder / name).glob("*.distcp"))
    ]
    found = [name for name in found if not name.startswith("optimizer")] or found
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several distributed checkpoints ({some(found, 6)}); give the model's")
    return Component("", folder, (folder / found[0],), config) if found else None


def trained_components(model_index: Path) -> list[str]:
    """The folders of a diffusers pipeline's denoiser and text encoders, as its index names them."""
    return [name for name in read_json(model_index) if _TRAINED.fullmatch(name)]


def _pipeline(folder: Path, kept: Collection[str] | None) -> Iterable[Component]:
    names = trained_components(folder / "model_index.json")
    there = [name for name in names if (folder / name).is_dir()]
    if not there:
        raise CheckpointError(
            f"{folder}: a pipeline without the folders of {some(names) or 'a transformer or unet'}; download it again"
        )
    for name in there:
        component = _model(folder / name, _within(kept, name))
        if component is None:
            raise _nothing(folder / name)
        yield replace(component, name=name)


def _within(kept: Collection[str] | None, folder: str) -> Collection[str] | None:
    """The files that were chosen in a folder, by their names there."""
    return None if kept is None else {file.removeprefix(f"{folder}/") for file in kept if file.startswith(f"{folder}/")}


def _sentence_transformer(folder: Path) -> Path | None:
    """The folder of the transformer in sentence-transformers' older layout, `0_Transformer`."""
    modules = folder / "modules.json"
    content = read_bytes(modules, most=MOST_JSON).decode("utf-8", errors="replace") if is_there(modules) else ""
    found = re.findall(r'"path":\s*"([^"/\\]+)"', content)
    return next((folder / name for name in found if name.startswith("0_") and (folder / name).is_dir()), None)


def _refuse_adapter(folder: Path) -> None:
    config = folder / "adapter_config.json"
    if is_there(config):
        base = read_json(config).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: an adapter, not a model; give its base model"
            + (f", {base}" if base else ", which its adapter_config.json does not name")
        )


def _refuse_deepspeed(folder: Path) -> None:
    inner = [path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith("global_step")]
    if inner or (folder / "zero_to_fp32.py").is_file() or any(_is_deepspeed(path.name) for path in folder.iterdir()):
        where = folder if (folder / "zero_to_fp32.py").is_file() or inner else folder.parent
        raise CheckpointError(
            f"{folder}: a DeepSpeed checkpoint, in one piece per process; put it together with "
            f"`python {where / 'zero_to_fp32.py'} {where} OUT --safe_serialization` and give OUT"
        )


def _is_deepspeed(name: str) -> bool:
    return bool(re.fullmatch(r"(zero_pp_rank_\d+_|bf16_zero_pp_rank_\d+_)?mp_rank_\d+_\w+_states\.pt", name))


def _config(folder: Path) -> Path | None:
    return folder / "config.json" if is_there(folder / "config.json") else None


def _nothing(folder: Path) -> CheckpointError:
    found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return CheckpointError(
        f"{folder}: no weights here: no {', '.join(SINGLE_FILES[:2])} or pytorch_model.bin, nor their "
        f"{INDEX_SUFFIX[1:]}; found {some(found, 12) or 'an empty folder'}. Give the folder or the weight file itself"
    )
