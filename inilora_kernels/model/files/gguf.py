"""GGUF files, llama.cpp's, with the names and the config that transformers gives them.

Values are read as bytes; `formats.gguf` turns them into a matrix.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ..aside import aside, modules_for
from ..config import require_counts
from .gguf_header import read_header
from .tensor import ContiguousTensor


@dataclass(frozen=True)
class GGUFTensor(ContiguousTensor):
    """A tensor of a GGUF file as bytes (rows, bytes per row).

    type: GGML's name for their quantization.
    values: the shape of the tensor that they encode.
    processor: transformers' own, which undoes what llama.cpp's converter did to the rows.
    """

    type: str
    values: tuple[int, ...]
    processor: Any


def open_gguf(file: Path) -> tuple[dict[str, GGUFTensor], dict[str, Any]]:
    """The tensors of a GGUF file by their names in transformers' model, and that model's config.

    Raises CheckpointError if the file is damaged, transformers does not load its architecture from GGUF, or gguf is not
    installed.
    """
    gguf, loading = _libraries(file)
    header = read_header(file, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    if header.parts > 1:
        raise CheckpointError(
            f"{file}: one of {header.parts} parts of a model, which transformers does not load; put them together with "
            f"`llama-gguf-split --merge` (llama.cpp), the first part and OUT.gguf, and give that"
        )
    try:
        with _as_file(header.without_values()) as path:
            config = loading.load_gguf_checkpoint(path, return_tensors=False)["config"]
        require_counts(config, file)
        processor = _processor(loading, config)
        model = _model(config, len(header.tensors))
        names = loading.get_gguf_hf_weights_map(model, processor)
    except CheckpointError:
        raise
    except Exception as error:
        # transformers takes the metadata as it comes, and raises whatever that leads to.
        raise CheckpointError(f"{file}: not a GGUF file that transformers {_version()} loads ({error})") from error
    tensors = {}
    for stored in header.tensors:
        rows = stored.shape[0] if stored.shape else 1
        tensors[_name(stored.name, names, processor)] = GGUFTensor(
            name=stored.name,
            file=file,
            dtype=torch.uint8,
            shape=(rows, stored.size // max(1, rows)),
            offset=stored.offset,
            type=gguf.GGMLQuantizationType(stored.type).name,
            values=stored.shape,
            processor=processor,
        )
    # A GGUF file does not name the class; without, an adapter would be named for the model without its head.
    return tensors, {**config, "architectures": [type(model).__name__]}


def _processor(loading: Any, config: dict[str, Any]) -> Any:
    """transformers', which it files by llama.cpp's name of the architecture: qwen3moe, minimax-m2."""
    kind = str(config["model_type"])
    known = loading.TENSOR_PROCESSORS
    own = next((known[name] for name in (kind, kind.replace("_", ""), kind.replace("_", "-")) if name in known), None)
    return (own or loading.TensorProcessor)(config=config)


def _name(stored: str, names: Mapping[str, str], processor: Any) -> str:
    """A tensor's name in the model; of a stack of experts, the parameter's with what llama.cpp calls it."""
    stack = re.fullmatch(r"(.+\.ffn_(gate|up|down)_exps)\.weight", stored)
    if stack and stack[1] in names and type(processor).__name__ == "Qwen2MoeTensorProcessor":
        return f"{names[stack[1]]}.{stack[2]}.weight"
    return names.get(stored, stored)


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """The path of a file with this content, in memory where there are such files: no folder may be writable."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("header.gguf"), "wb") as stream:
            stream.write(content)
            stream.flush()
            yield f"/proc/self/fd/{stream.fileno()}"
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "header.gguf"
        file.write_bytes(content)
        yield str(file)


def _model(config: dict[str, Any], weights: int) -> Any:
    transformers = importlib.import_module("transformers")
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"), aside(), modules_for(weights):
        return transformers.AutoModelForCausalLM.from_config(settings)


def _libraries(file: Path) -> tuple[Any, Any]:
    try:
        return importlib.import_module("gguf"), importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as error:
        raise CheckpointError(f"{file}: reading a GGUF file needs gguf ({error}); pip install gguf") from error


def _version() -> str:
    return str(importlib.import_module("transformers").__version__)
