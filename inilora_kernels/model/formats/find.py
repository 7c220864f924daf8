"""Which weights a checkpoint holds: each format in turn looks at its stored tensors, module by module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..files.tensor import StoredTensor
from . import bitsandbytes, block_fp8, compressed_tensors, fp4, gguf, gptq, mlx, torchao
from .weight import Format, StoredModule, StoredWeight, unreadable

# The first that recognizes a module's tensors takes it.
FORMATS: tuple[Format, ...] = (
    gguf.find,
    block_fp8.find,
    fp4.find,
    compressed_tensors.find,
    bitsandbytes.find,
    gptq.find,
    mlx.find,
    torchao.find,
)

# What quantizers without a format here store in place of a weight, or next to it: HQQ, AQLM, VPTQ, HIGGS.
_UNKNOWN = ("qweight", "weight_packed", "W_q", "blocks")
_UNKNOWN_IF_QUANTIZED = ("codes", "indices", "weight_scale", "weight_scale_inv")


def find_weights(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> dict[str, StoredWeight]:
    """Every weight by its name in the model, in the order of the tensors.

    tensors: the stored ones, by name.
    config: config.json.
    metadata: of the weight files; torchao describes its tensors there.
    """
    config = config or {}
    quantization = config.get("quantization_config") or config.get("quantization") or {}
    dtype = _dtype(config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, part = module_and_part(name, tensors)
        modules.setdefault(module, {})[part] = tensor
    weights = {}
    for name, parts in modules.items():
        weight = _weight(StoredModule(name, parts, quantization, dtype, metadata))
        if weight is not None:
            weights[weight.name] = weight
    return weights


def module_and_part(name: str, tensors: Collection[str]) -> tuple[str, str]:
    """The module that a tensor belongs to, and its name there; for a fused parameter of experts, the parameter."""
    module, within, rest = name.partition(".weight.")
    if within:
        return module, f"weight.{rest}"
    for ending in ("_blocks", "_scales"):
        parameter = name.removesuffix(ending)
        if parameter != name and f"{parameter}_blocks" in tensors and f"{parameter}_scales" in tensors:
            return parameter, ending[1:]
    if name.endswith("in_proj_weight"):  # of torch's MultiheadAttention, see `is_fused_attention`
        return name.removesuffix("_weight"), "weight"
    module, _, part = name.rpartition(".")
    return module, part


def _weight(module: StoredModule) -> StoredWeight | None:
    for find in FORMATS:
        try:
            weight = find(module)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            # A description is of another program, from a file that may hold anything.
            return unreadable(module, f"its description is damaged: {type(error).__name__} {str(error)[:80]}")
        if weight is not None:
            return weight
    method = module.quantization.get("quant_method")
    unknown = _UNKNOWN + (_UNKNOWN_IF_QUANTIZED if method else ())
    if any(part in module.tensors for part in unknown):
        found = ", ".join(f"{part} {tensor.dtype}".replace("torch.", "") for part, tensor in module.tensors.items())
        return unreadable(module, f"{f'by {method}, ' if method else ''}stored as {found}")
    values = module.tensors.get("weight")
    return _plain(f"{module.name}.weight" if module.name else "weight", values) if values is not None else None


def _plain(name: str, tensor: StoredTensor) -> StoredWeight:
    return StoredWeight(name, tensor.shape, tensor.dtype, "", {"weight": tensor})


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the model computes; formats that do not state their own are read as this."""
    for own in (config, config.get("text_config") or {}):
        dtype = getattr(torch, str(own.get("dtype") or own.get("torch_dtype")).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
            return dtype
    return torch.bfloat16
