"""GGUF files, llama.cpp's, with the names and the config that transformers gives them.

Values are read as bytes; `formats.gguf` turns them into a matrix.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
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
    try:
        reader = gguf.GGUFReader(file)
        config = loading.load_gguf_checkpoint(str(file), return_tensors=False)["config"]
        processor = loading.TENSOR_PROCESSORS.get(config["model_type"], loading.TensorProcessor)(config=config)
        model = _model(config)
        names = loading.get_gguf_hf_weights_map(model, processor)
    except Exception as error:
        # The reader slices at whatever offsets a damaged file states, and raises what numpy raises.
        raise CheckpointError(f"{file}: not a GGUF file that transformers {_version()} loads ({error})") from error
    tensors = {}
    for stored in reader.tensors:
        values = tuple(int(side) for side in reversed(stored.shape))
        rows = values[0] if values else 1
        tensors[names.get(stored.name, stored.name)] = GGUFTensor(
            name=stored.name,
            file=file,
            dtype=torch.uint8,
            shape=(rows, int(stored.n_bytes) // max(1, rows)),
            offset=int(stored.data_offset),
            type=stored.tensor_type.name,
            values=values,
            processor=processor,
        )
    # A GGUF file does not name the class; without, an adapter would be named for the model without its head.
    return tensors, {**config, "architectures": [type(model).__name__]}


def _model(config: dict[str, Any]) -> Any:
    transformers = importlib.import_module("transformers")
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


def _libraries(file: Path) -> tuple[Any, Any]:
    try:
        return importlib.import_module("gguf"), importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as error:
        raise CheckpointError(f"{file}: reading a GGUF file needs gguf ({error}); pip install gguf") from error


def _version() -> str:
    return str(importlib.import_module("transformers").__version__)
