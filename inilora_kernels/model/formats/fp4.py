"""4-bit floats (E2M1), two a byte, with a scale for each group of 16 or 32 values of a row: NVFP4 and MXFP4.

NVFP4   W = e2m1(weight) · weight_scale · weight_scale_2             ModelOpt; groups of 16, scales in 8-bit floats
        W = e2m1(weight_packed) · (weight_scale / weight_global_scale)   compressed-tensors
MXFP4   W = e2m1(blocks) · 2^(scales − 127)                          gpt-oss's experts; groups of 32
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...memory import empty
from ..files.tensor import StoredTensor
from .block_fp8 import FLOAT8
from .weight import StoredModule, StoredWeight, decode_floats, exponents, in_strips, unreadable


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

        def factors() -> Tensor:
            each, factor = _every(scale.dtype).to(torch.float32), over.read().to(torch.float32)
            return each / factor if divides else each * factor

        return _matrix(module, packed, scale, over, factors, "nvfp4")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) and over is None:
        return _matrix(module, packed, scale, None, lambda: exponents(_every(scale.dtype)), "mxfp4")
    return None


def _matrix(
    module: StoredModule,
    packed: StoredTensor,
    scale: StoredTensor,
    over: StoredTensor | None,
    factors: Callable[[], Tensor],
    kind: str,
) -> StoredWeight:
    """factors: what each of the 256 codes of a scale stands for."""
    size = 16 if kind == "nvfp4" else 32
    d, k = packed.shape[0], 2 * packed.shape[-1]
    if len(packed.shape) != 2 or scale.shape != (d, k // size) or k % size:
        return unreadable(module, f"its packed weight {packed.shape} and weight_scale {scale.shape} do not fit {kind}")

    def dequantize(rows: slice) -> Tensor:
        each = factors()

        def fill(own: slice, out: Tensor, *read: Callable[[slice], Tensor]) -> None:
            codes, scales = (one(own).view(torch.uint8) for one in read)
            decode_floats(codes, scales, each, out)

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
    if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape or blocks.shape[3] != 16:
        return unreadable(module, f"its blocks {blocks.shape} and scales {scales.shape} do not fit mxfp4")
    experts, d, groups, size = blocks.shape
    k = groups * 2 * size

    def dequantize(rows: slice) -> Tensor:
        values, each = empty((rows.stop - rows.start, d, k), module.dtype), exponents(_every(torch.uint8))
        for place, expert in enumerate(range(rows.start, rows.stop)):
            one = slice(expert, expert + 1)
            packed, scale = blocks.read(one).view(d, -1), scales.read(one).view(torch.uint8).view(d, groups)
            decode_floats(packed, scale, each, values[place])
        return values

    return StoredWeight(
        name=module.name,
        shape=(experts, d, k),
        dtype=module.dtype,
        dequantization="mxfp4",
        stored={"blocks": blocks, "scales": scales},
        dequantize=dequantize,
    )


def _every(dtype: torch.dtype) -> Tensor:
    """The 256 numbers of an 8-bit dtype."""
    return torch.arange(256, dtype=torch.uint8).view(dtype)
