"""Models on the Hugging Face hub: huggingface_hub downloads into its own cache what will be read, and no more."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from ..errors import CheckpointError
from ..storage.reading import read_json
from .layout import read_weight_map, trained_components, weight_files
from .location import WEIGHT_SUFFIXES, hub_id, near_models

# (names of all tensors that are in shards, config.json) ↦ those that will be read. Names in a pipeline begin with the
# model's, and it has no config.json.
Choose: TypeAlias = Callable[[Collection[str], Mapping[str, Any] | None], Collection[str]]

# Seconds for the hub to answer, as huggingface_hub allows for a file's.
_PATIENCE = 10.0
# Small files that say what a repository is.
_DESCRIBES = re.compile(r"(.*/)?(config|model_index|modules|params|adapter_config|[\w.-]+\.index(\.[\w-]+)?)\.json")
# Weights for other libraries, and pictures: no copy of a model needs them.
_NOT_THE_MODELS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.pb", "onnx/*", "openvino/*"]


@dataclass(frozen=True)
class Download:
    """A model in huggingface_hub's cache.

    name: its id on the hub.
    files: the weight files that were asked for, by their paths in the repository; None for all.
    """

    folder: Path
    name: str
    files: frozenset[str] | None


def fetch(path: Path, revision: str | None, token: str | None, choose: Choose | None) -> Download:
    """Download what is not in the cache yet; parameters as for `open_checkpoint`. Raises CheckpointError."""
    asked = hub_id(path)
    if asked is None:
        raise CheckpointError(
            f"{path}: no such file or folder{near_models(path)}; give a Hugging Face model folder, a "
            f".safetensors file, or the id of a model on the hub, org/name{_meant(path.as_posix())}"
        )
    name, revision = asked[0], revision or asked[1]
    try:
        if choose is None:
            return _whole(name, revision, token)
        return _parts(name, revision, token, choose)
    except _network_errors() as error:
        raise CheckpointError(f"{path}: {_reason(error, name, revision)}{near_models(path)}") from error
    except _library().errors.HFValidationError as error:
        raise CheckpointError(
            f"{path}: no such file or folder{near_models(path)}; nor is it the id of a model on the hub ({error})"
        ) from error


def _meant(text: str) -> str:
    """What was probably meant by something that looks like an id, to end an error."""
    where = r"((https?:/+)?(huggingface|hf)\.co|hf:)/+"
    address = re.match(where + r"(?P<id>[\w.-]+/[\w.-]+)(/tree/(?P<revision>[\w.-]+))?", text)
    if address:
        return f": {address['id']}{'@' + address['revision'] if address['revision'] else ''}"
    if gguf := re.fullmatch(r"([\w.-]+/[\w.-]+):((UD-)?(I?Q\d|B?F16|F32|MXFP4)\w*)", text):
        return (
            f". Of a repository's GGUF files: `hf download {gguf[1]} --include '*{gguf[2]}*' --local-dir OUT`, and "
            f"give the file"
        )
    if with_revision := re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", text):
        return f"@revision: {'@'.join(with_revision.groups())}"
    if within := re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w.-]+)", text):
        if within[2].endswith(WEIGHT_SUFFIXES):
            return f". Of one file of a repository: `hf download {within[1]} {within[2]}`, and give the path it prints"
        return (
            f". Of a repository's folder: `hf download {within[1]} --include '{within[2]}/*' --local-dir OUT`, and "
            f"give OUT/{within[2]}; a pipeline's models are all found by {within[1]}"
        )
    return ""


def _whole(name: str, revision: str | None, token: str | None) -> Download:
    folder = _library().snapshot_download(name, revision=revision, token=token, ignore_patterns=_NOT_THE_MODELS)
    return Download(Path(folder), name, None)


def _parts(name: str, revision: str | None, token: str | None, choose: Choose) -> Download:
    names, cached = _listed(name, revision, token)

    def get(file: str) -> Path:
        options = {"revision": revision, "token": token, "local_files_only": cached}
        return Path(_library().hf_hub_download(name, file, **options))

    described = {file: get(file) for file in names if _DESCRIBES.fullmatch(file)}
    pipeline = "model_index.json" in described
    if not described and not names:
        raise CheckpointError(f"{name}: an empty repository; give a model's")
    chosen: set[str] = set()
    shards: dict[str, str] = {}
    config = None
    for folder in _folders(names, described):
        here = [PurePosixPath(file).name for file in names if str(PurePosixPath(file).parent) == (folder or ".")]
        found = weight_files(here, f"{name}/{folder}".rstrip("/"), described.get(_join(folder, "config.json")))
        if found is not None and found.index is not None:
            weight_map = read_weight_map(described[_join(folder, found.index)])
            prefix = f"{folder}." if pipeline else ""
            shards |= {prefix + tensor: _join(folder, shard) for tensor, shard in weight_map.items()}
            config = None if pipeline else described.get(_join(folder, "config.json"))
        elif found is not None:
            chosen |= {_join(folder, file) for file in found.files}
    if shards:
        wanted = choose(list(shards), read_json(config) if config is not None else None)
        chosen |= {shards[tensor] for tensor in wanted}
    if not chosen:
        raise CheckpointError(f"{name}: no weights in this repository; there are {', '.join(sorted(names)[:12])}")
    places = {file: get(file) for file in sorted(chosen)}
    example, place = next(iter(places.items()))
    root = place.parents[len(PurePosixPath(example).parts) - 1]
    return Download(root, name, frozenset(chosen))


def _listed(name: str, revision: str | None, token: str | None) -> tuple[list[str], bool]:
    """The files of a repository, and whether they are those in the cache: offline, or where the hub does not answer."""
    try:
        # One request: list_repo_files tries six times, for half a minute, where there is no network.
        found = _library().model_info(name, revision=revision, token=token, timeout=_PATIENCE)
    except (_library().errors.RepositoryNotFoundError, _library().errors.RevisionNotFoundError):
        raise
    except _network_errors():
        kept = _in_the_cache(name, revision)
        if not kept:
            raise
        return kept, True
    return [one.rfilename for one in found.siblings or ()], False


def _in_the_cache(name: str, revision: str | None) -> list[str]:
    """The files of a repository that huggingface_hub's cache holds."""
    some = None
    for file in ("config.json", "model_index.json", "modules.json", "model.safetensors"):
        some = some or _library().try_to_load_from_cache(name, file, revision=revision)
    root = Path(some).parent if isinstance(some, str) else None
    return [file.relative_to(root).as_posix() for file in sorted(root.rglob("*")) if file.is_file()] if root else []


def _folders(names: Sequence[str], described: Mapping[str, Path]) -> list[str]:
    """The folders of a repository that hold models: its own, a pipeline's, or sentence-transformers' older one."""
    if "model_index.json" in described:
        return [
            part
            for part in trained_components(described["model_index.json"])
            if any(f.startswith(f"{part}/") for f in names)
        ]
    if "modules.json" in described and not any("/" not in name and name.startswith("model.") for name in names):
        return sorted({name.split("/")[0] for name in names if name.startswith("0_")})
    return [""]


def _join(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and from huggingface_hub 1 on those of its HTTP client too, which are none."""
    clients = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return (OSError, *(client.HTTPError for client in clients if client is not None))


def _reason(error: Exception, name: str, revision: str | None) -> str:
    if isinstance(error, _library().errors.GatedRepoError):
        return f"access is limited to users who accepted its terms; accept them at hf.co/{name} and give a token"
    if isinstance(error, _library().errors.RevisionNotFoundError):
        return f"the hub's {name} has no revision {revision}"
    if isinstance(error, _library().errors.RepositoryNotFoundError):
        return "no such file or folder here, and no such model on the hub; a private one needs a token"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return "the hub does not know the token; give a valid one, or log in anew by `hf auth login`"
    if isinstance(error, _library().errors.OfflineModeIsEnabled):
        return "no such file or folder here, not in the hub's cache, and HF_HUB_OFFLINE is set; download it first"
    if isinstance(error, _library().errors.LocalEntryNotFoundError):
        return (
            "no such file or folder here; the hub cannot be reached, and not all files that are needed are in its "
            "cache: download it first"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return f"no such file or folder here, and it cannot be downloaded from the hub ({reason})"


def _library() -> Any:
    """huggingface_hub, which runs on local files do not need."""
    importlib.import_module("huggingface_hub.errors")
    return importlib.import_module("huggingface_hub")
