"""Folders on disk: PEFT's adapter folder, and a copy of a model with a few weights changed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, FactorFileError
from ..model.checkpoint import Checkpoint
from ..storage.atomic import save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]

# Other copies of a model's weights, and files of other programs, which a changed model must not carry along.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|pb|ot|tflite|npz)(\.index\.json)?|\..*"
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT stores it.

    config: adapter_config.json.
    factors: A (r, in_features) and B (out_features, r) by the module's name in the model.
    others: tensors trained whole (`modules_to_save`), by their full key.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Tensor]

    def scaling(self, module: str) -> float:
        """s of sBA: lora_alpha / r, or lora_alpha / √r with rslora, by the module's own rank and alpha."""
        rank = self.factors[module][0].shape[0]
        alpha = pattern_value(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def pattern_value(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a module: keys are regular expressions of name endings.

    >>> pattern_value({"layer.0.query": 4}, "encoder.layer.0.query", 8)
    4
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder that PEFT, or a trainer by way of it, wrote. Raises FactorFileError.

    Refused, because BA is not all that they add to W: DoRA, and LoRA with a bias.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise FactorFileError(
            f"{error.filename or folder}: no such file; give the folder with {CONFIG} and {WEIGHTS} "
            f"that the trainer saved"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise FactorFileError(f"{folder}: damaged adapter ({error}); save it again") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        found = f"peft_type {config.get('peft_type')}, use_dora {config.get('use_dora')}, bias {config.get('bias')}"
        raise FactorFileError(f"{folder / CONFIG}: not a plain LoRA ({found}); only A and B can be converted")
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    if not modules:
        raise FactorFileError(f"{folder / WEIGHTS}: no lora_A in it; give the folder of a trained LoRA adapter")
    factors = {}
    for module in modules:
        if f"{module}.lora_B.weight" not in tensors:
            raise FactorFileError(f"{folder / WEIGHTS}: {module} has lora_A but no lora_B; save it again")
        A, B = tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")
        factors[module.removeprefix(KEY_PREFIX)] = (A, B)
    strange = [key for key in tensors if "lora_" in key]
    if strange:
        raise FactorFileError(f"{folder / WEIGHTS}: {strange[0]} is neither A nor B; only A and B can be converted")
    return Adapter(config, factors, tensors)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write the two files of an adapter into a folder that is there."""
    tensors = {}
    for module, (A, B) in adapter.factors.items():
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = A.contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = B.contiguous()
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, {**tensors, **adapter.others})


def copy_model(
    checkpoint: Checkpoint, folder: Path, changed: Collection[str], change: Callable[[str, Tensor], Tensor]
) -> None:
    """Copy a model's folder: config, tokenizer and whatever else is there, and its weights, some changed.

    changed: names of tensors.
    change: gets a tensor's name and the tensor, one at a time, and returns one of the same shape and dtype.

    A safetensors shard is copied as a file and then overwritten in the places of the changed tensors, so everything
    else stays as it was to the byte, and memory holds one tensor. A torch .bin becomes safetensors, a shard at a time.

    Raises CheckpointError if the checkpoint is a single file and no folder.
    """
    source = checkpoint.path
    if not source.is_dir():
        raise CheckpointError(f"{source}: a single file; give the model's folder, with its config and tokenizer")
    shutil.copytree(
        source,
        folder,
        ignore=lambda _, names: [name for name in names if _OTHER_WEIGHTS.fullmatch(name)],
        dirs_exist_ok=True,
    )
    shards = sorted({entry.file for entry in checkpoint.tensors.values()})
    if shards[0].suffix == ".bin":
        _rewrite_bin(checkpoint, shards, folder, changed, change)
        return
    for shard in shards:
        shutil.copyfile(shard, folder / shard.name)
    for index in source.glob("*.safetensors.index.json"):
        shutil.copyfile(index, folder / index.name)
    for name in changed:
        entry = checkpoint.tensors[name]
        assert entry.offset is not None
        with (folder / entry.file.name).open("r+b") as stream:
            stream.seek(entry.offset)
            stream.write(_bytes(_checked(change, name, entry.read())))


def _rewrite_bin(
    checkpoint: Checkpoint,
    shards: list[Path],
    folder: Path,
    changed: Collection[str],
    change: Callable[[str, Tensor], Tensor],
) -> None:
    weight_map = {}
    for shard in shards:
        file = shard.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        tensors = {}
        for name, entry in checkpoint.tensors.items():
            if entry.file == shard:
                tensor = entry.read()
                tensors[name] = _checked(change, name, tensor) if name in changed else tensor
        save_tensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in checkpoint.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _checked(change: Callable[[str, Tensor], Tensor], name: str, tensor: Tensor) -> Tensor:
    new = change(name, tensor).contiguous()
    assert (new.shape, new.dtype) == (tensor.shape, tensor.dtype), name
    return new


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
