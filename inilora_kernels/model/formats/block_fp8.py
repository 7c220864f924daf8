"""8-bit floats with a scale for each block of 128×128 values, as DeepSeek, Qwen and MiniMax ship them.

    W = weight · weight_scale_inv[row // 128, column // 128]

Despite its name, `weight_scale_inv` is multiplied with. A scale without dimensions is for the whole matrix; Mistral's
own files (`consolidated.safetensors`) call it `qscale_weight`, as vLLM reads it. FP8 with a `weight_scale` of another
shape is compressed_tensors.py's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..files.tensor import StoredTensor
from .weight import StoredModule, StoredWeight, decode_bytes, exponents, in_strips, unreadable

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale_inv", "qscale_weight")


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    part = next((part for part in _SCALES if module.has("weight", part)), None)
    if part is None or module.tensors["weight"].dtype not in FLOAT8:
        return None
    weight, scale = module.tensors["weight"], module.tensors[part]
    block = _block(weight.shape, scale.shape, module.quantization.get("weight_block_size"))
    if block is None:
        return unreadable(
            module,
            f"its {part} of shape {scale.shape} does not fit blocks of "
            f"{module.quantization.get('weight_block_size')} in a weight of shape {weight.shape}",
        )
    shape = (weight.shape[0], weight.shape[1])

    def dequantize(rows: slice) -> Tensor:
        return bytes_in_blocks(weight, scale, block, rows, module.dtype)

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=shape,
        dtype=module.dtype,
        dequantization=f"fp8 in blocks of {block[0]}×{block[1]}",
        stored={"weight": weight, part: scale},
        dequantize=dequantize,
    )


def bytes_in_blocks(
    weight: StoredTensor, scale: StoredTensor, block: tuple[int, int], rows: slice, dtype: torch.dtype
) -> Tensor:
    """8-bit values times their block's scale; some rows of the matrix."""
    factors = exponents(scale.read())

    def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor]) -> None:
        decode_bytes(read(own), block_scales(factors, own, block), block[1], out)

    return in_strips(rows, weight.shape[1], dtype, fill, [weight])


def block_scales(scale: Tensor, rows: slice, block: tuple[int, int]) -> Tensor:
    """The scales of rows, (rows, groups), of a whole matrix's block scales."""
    scale = scale.reshape(-1, 1 if scale.ndim < 2 else scale.shape[-1])
    return scale[torch.arange(rows.start, rows.stop) // block[0]]


def _block(shape: tuple[int, ...], scale: tuple[int, ...], stated: object) -> tuple[int, int] | None:
    if len(shape) != 2:
        return None
    if scale in ((), (1,), (1, 1)):
        return (shape[0], shape[1])
    sizes = stated if isinstance(stated, list) and len(stated) == 2 else [128, 128]
    fits = len(scale) == 2 and all(
        -(-side // size) == count for side, size, count in zip(shape, sizes, scale, strict=True)
    )
    return (sizes[0], sizes[1]) if fits else None
