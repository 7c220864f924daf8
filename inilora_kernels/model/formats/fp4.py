"""4-bit floats (E2M1), two a byte, with a scale for each group of 16 or 32 values of a row: NVFP4 and MXFP4.

NVFP4   W = e2m1(weight) · weight_scale · weight_scale_2             ModelOpt; groups of 16, scales in 8-bit floats
        W = e2m1(weight_packed) · (weight_scale / weight_global_scale)   compressed-tensors
MXFP4   W = e2m1(blocks) · 2^(scales − 127)                          gpt-oss's experts; groups of 32
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...storage.reading import empty
from ..files.tensor import StoredTensor
from .block_fp8 import FLOAT8
from .weight import StoredModule, StoredWeight, decode_floats, exponents, float32, in_strips, unreadable


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in one of these formats; None of any other."""
    tensors = module.tensors
    packed = tensors.get("weight_packed") or tensors.get("weight")
    if module.has("blocks", "scales") and tensors["blocks"].dtype == torch.uint8:
        return _experts(module)
    if packed is None or packed.dtype != torch.uint8 or not module.has("weight_scale"):
        return None
    scale = tensors["weight_scale"]
    over = tensors.get("weight_scale_2") or tensors.get("weight_global_scale")
    if scale.dtype in FLOAT8 and over is not None:
        divides = "weight_global_scale" in tensors

        def group_scale(own: Tensor) -> Tensor:
            factor = over.read().to(torch.float32)
            return float32(own) / factor if divides else float32(own) * factor

        return _matrix(module, packed, scale, over, group_scale, "nvfp4")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) and over is None:
        return _matrix(module, packed, scale, None, exponents, "mxfp4")
    return None


def _matrix(
    module: StoredModule,
    packed: StoredTensor,
    scale: StoredTensor,
    over: StoredTensor | None,
    group_scale: Callable[[Tensor], Tensor],
    kind: str,
) -> StoredWeight:
    size = 16 if kind == "nvfp4" else 32
    d, k = packed.shape[0], 2 * packed.shape[-1]
    if len(packed.shape) != 2 or scale.shape != (d, k // size) or k % size:
        return unreadable(module, f"its packed weight {packed.shape} and weight_scale {scale.shape} do not fit {kind}")

    def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor], read_scale: Callable[[slice], Tensor]) -> None:
        decode_floats(read(own), group_scale(read_scale(own)), out)

    def dequantize(rows: slice) -> Tensor:
        return in_strips(rows, k, module.dtype, fill, [packed, scale])

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=module.dtype,
        dequantization=kind,
        stored={tensor.name.rpartition(".")[2]: tensor for tensor in (packed, scale, over) if tensor is not None},
        dequantize=dequantize,
    )


def _experts(module: StoredModule) -> StoredWeight:
    """A fused parameter of all experts: blocks (experts, d, groups, 16), scales (experts, d, groups)."""
    blocks, scales = module.tensors["blocks"], module.tensors["scales"]
    if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
        return unreadable(module, f"its blocks {blocks.shape} and scales {scales.shape} do not fit mxfp4")
    experts, d, groups, size = blocks.shape
    k = groups * 2 * size

    def dequantize(rows: slice) -> Tensor:
        values = empty((rows.stop - rows.start, d, k), module.dtype)
        for place, expert in enumerate(range(rows.start, rows.stop)):
            one = slice(expert, expert + 1)
            packed, scale = blocks.read(one).view(d, -1), exponents(scales.read(one).view(d, groups))
            decode_floats(packed, scale, values[place])
        return values

    return StoredWeight(
        name=module.name,
        shape=(experts, d, k),
        dtype=module.dtype,
        dequantization="mxfp4",
        stored={"blocks": blocks, "scales": scales},
        dequantize=dequantize,
    )
