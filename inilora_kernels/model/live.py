"""A model in memory as a checkpoint: the same factors as from its folder, without a file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint, open_checkpoint
from .files.gathered import gather
from .files.live import LiveTensor
from .files.tensor import StoredTensor
from .formats.find import find_weights
from .hub import Choose
from .location import located
from .names import adapter_among
from .residual import require_no_residual

# A model's folder, weight file or hub id; or the model itself, or its state dict.
Model: TypeAlias = str | PathLike[str] | nn.Module | Mapping[str, Tensor]


def open_model(model: Model, revision: str | None, token: str | None, choose: Choose | None) -> Checkpoint:
    """A model on disk, on the hub or in memory; see `open_checkpoint`, `open_live`. Raises CheckpointError."""
    if isinstance(model, (nn.Module, Mapping)):
        return open_live(model, choose)
    if isinstance(model, (str, PathLike)):
        path = located(model)
        require_no_residual(path)
        return open_checkpoint(path, revision, token, choose)
    raise CheckpointError(
        f"approximate_model was given a {type(model).__name__}; give a model's path or hub id, the live model, or its "
        f"state dict; approximate takes matrices in memory"
    )


def open_live(model: nn.Module | Mapping[str, Tensor], choose: Choose | None = None) -> Checkpoint:
    """A live model, quantized or not, or a state dict, as a checkpoint. Its tensors stay where they are.

    One that several processes hold together (FSDP2, ZeRO-3) is opened by all of them at once: its tensors are gathered
    into a temporary file, one at a time.

    choose: of a sharded model, the tensors that will be read; None for all.

    Raises CheckpointError if it holds no tensors, or weights on the meta device, or adapters, and for a sharded model
    what `gather` raises.
    """
    label = Path(f"<{type(model).__name__}>")
    held = _without_what_is_unused(model) if isinstance(model, nn.Module) else model
    held, metadata = _taken_apart(held, label)
    live = {name: LiveTensor(name, label, tensor) for name, tensor in held.items() if isinstance(tensor, Tensor)}
    tensors: dict[str, StoredTensor] = {**live}
    if not tensors:
        raise CheckpointError(f"{label}: no tensors in it; give a model, its state dict, or its folder{_inside(held)}")
    if isinstance(model, nn.Linear):
        raise CheckpointError(f"{label}: a single layer; `approximate` takes layers and matrices")
    without = next((name for name, tensor in held.items() if isinstance(tensor, Tensor) and tensor.is_meta), None)
    if without is not None:
        raise CheckpointError(
            f"{label}: {without} is on the meta device, without values, as accelerate leaves what it offloads; load "
            f"the weights first, or give the model's folder"
        )
    adapted = adapter_among(tensors)
    if adapted is not None:
        raise CheckpointError(f"{label}: it has adapters already ({adapted}); factorize it before any are added")
    config = _config(model)
    sharded = [name for name, tensor in live.items() if _processes(tensor.tensor) > 1]
    if sharded:
        chosen = frozenset(sharded if choose is None else choose(list(tensors), config))
        tensors |= gather({name: live[name] for name in sharded if name in chosen})
    weights = find_weights(tensors, config, metadata)
    if isinstance(model, nn.Module):
        repacked = {name for name, module in model.named_modules() if _is_repacked(module)}
        weights |= {
            name: replace(weight, refusal="gptqmodel lays its words out anew on loading: give the folder or hub id")
            for name, weight in weights.items()
            if name.removesuffix(".weight") in repacked
        }
        linear = {name for name, module in model.named_modules(remove_duplicate=False) if _is_linear(module)}
        weights = {
            name: weight
            for name, weight in weights.items()
            if name.removesuffix(".weight") in linear or weight.is_fused_attention
        }
    return Checkpoint(label, tensors, weights, config, name=str(getattr(model, "name_or_path", "") or label))


def _inside(held: Mapping[str, Any]) -> str:
    """What there is in place of tensors, to end an error."""
    key = next((key for key, value in held.items() if isinstance(value, Mapping) and value), None)
    if key is not None:
        return f"; there is another dict under {key!r}: give that"
    return f"; there are values of type {type(next(iter(held.values()))).__name__}" if held else ""


def _without_what_is_unused(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the scales of layers whose weight compressed-tensors has unpacked for good."""
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if str(getattr(module, "quantization_status", "")).lower().endswith("decompressed"):
            for part in [part for part in held if part.startswith(f"{name}.weight_")]:
                del held[part]
    return held


def _taken_apart(held: Mapping[str, Tensor], label: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor, torchao's in the parts in which transformers saves them, and the metadata that describes those."""
    plain = dict(held)
    metadata: dict[str, str] = {}
    for name, tensor in held.items():
        data = tensor.detach() if isinstance(tensor, Tensor) else None
        if not type(data).__module__.startswith("torchao."):
            continue
        support: Any = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
        try:
            parts, described = support.flatten_tensor_state_dict({name: data})
        except (ValueError, TypeError, NotImplementedError) as error:
            raise CheckpointError(
                f"{label}: {name} is torchao's {type(data).__name__}, which torchao cannot save part by part; give the "
                f"model's folder"
            ) from error
        del plain[name]
        plain |= parts
        metadata |= described
    return plain, metadata


def _is_repacked(module: nn.Module) -> bool:
    """Whether it is a layer of gptqmodel, whose tensors are not those of the file: GPTQ's zero points, AWQ's order."""
    return type(module).__module__.startswith("gptqmodel.") and hasattr(module, "qweight")


def _processes(tensor: object) -> int:
    """How many processes share a tensor: a DTensor of FSDP2, or a parameter of ZeRO-3."""
    if hasattr(tensor, "ds_id"):
        return dist.get_world_size()
    mesh = getattr(tensor, "device_mesh", None)
    return int(mesh.size()) if mesh is not None else 1


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, quantizers' replacements for it, and transformers' Conv1D."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _config(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Any] | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    return {**config.to_dict(), "architectures": [type(model).__name__]}
