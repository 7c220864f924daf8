"""What llm-compressor and its library compressed-tensors write; fbgemm and ModelOpt's FP8 write the same.

    8 bits a value   W = (weight − zero_point) · weight_scale             float8 or int8
    packed           W = (codes(weight_packed) − 2^(bits−1) − zero_point) · weight_scale

The scale is one number, one for each row, one for each group of columns, or one for each block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.threads import one_torch_thread
from .block_fp8 import FLOAT8, bytes_in_blocks
from .weight import (
    StoredModule,
    StoredWeight,
    as_bytes,
    codes,
    decode_integers,
    in_strips,
    unreadable,
)


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    if module.has("weight", "weight_scale") and module.tensors["weight"].dtype in (*FLOAT8, torch.int8):
        return _one_byte_each(module)
    if module.has("weight_packed", "weight_scale") and module.tensors["weight_packed"].dtype == torch.int32:
        return _packed(module)
    return None


def _one_byte_each(module: StoredModule) -> StoredWeight:
    weight, scale = module.tensors["weight"], module.tensors["weight_scale"]
    zero_point = module.tensors.get("weight_zero_point")
    if len(weight.shape) != 2:
        return unreadable(module, f"its weight has the shape {weight.shape}")
    shape = (weight.shape[0], weight.shape[1])
    block = _block(shape, scale.shape)
    if block is None:
        return unreadable(module, f"its weight_scale of shape {scale.shape} does not fit a weight of shape {shape}")
    dtype = scale.dtype if scale.dtype in (torch.float16, torch.bfloat16) else module.dtype

    def dequantize(rows: slice) -> Tensor:
        if zero_point is None:
            return bytes_in_blocks(weight, scale, block, rows, dtype)
        zeros, scales = (tensor.read().to(torch.float32) for tensor in (zero_point, scale))
        each = torch.arange(shape[1]) // block[1]

        def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor]) -> None:
            # (values − zero) · scale, each rounded as the library does: integers below 2⁸ are exact.
            block_row = torch.arange(own.start, own.stop) // block[0]
            zero, factor = (one.reshape(len(one), -1)[block_row][:, each] for one in (zeros, scales))
            out.copy_((read(own).to(torch.float32) - zero) * factor)

        return in_strips(rows, shape[1], dtype, fill, [weight])

    kind = "int8" if weight.dtype == torch.int8 else "fp8"
    stored = {"weight": weight, "weight_scale": scale} | ({"weight_zero_point": zero_point} if zero_point else {})
    return StoredWeight(
        name=f"{module.name}.weight",
        shape=shape,
        dtype=dtype,
        dequantization=f"{kind}, a scale for {block[0]}×{block[1]}",
        stored=stored,
        dequantize=dequantize,
    )


def _block(shape: tuple[int, int], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """The rows and columns that one scale stands for."""
    counts = (*scale, 1) if len(scale) == 1 else scale or (1, 1)
    if len(counts) != 2 or 0 in counts:
        return None
    # Blocks may be cut off at the edge; 128 is the size in all such models.
    sizes = [side // count if side % count == 0 else 128 for side, count in zip(shape, counts, strict=True)]
    fits = all(-(-side // size) == count for side, size, count in zip(shape, sizes, counts, strict=True))
    return (sizes[0], sizes[1]) if fits else None


def _packed(module: StoredModule) -> StoredWeight:
    packed, scale = module.tensors["weight_packed"], module.tensors["weight_scale"]
    zero_point, g_idx = module.tensors.get("weight_zero_point"), module.tensors.get("weight_g_idx")
    if not module.has("weight_shape") or len(packed.shape) != 2 or len(scale.shape) > 2:
        return unreadable(module, "it has no weight_shape, or is packed in other than two dimensions")
    d, k = (int(side) for side in module.tensors["weight_shape"].read())
    bits = next((bits for bits in range(1, 9) if -(-k * bits // 32) == packed.shape[1]), None)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if bits is None or packed.shape[0] != d or (k % groups and g_idx is None):
        return unreadable(module, f"its weight_packed {packed.shape} and weight_scale {scale.shape} do not fit {d}×{k}")
    dtype, half = scale.dtype if scale.dtype.itemsize > 1 else module.dtype, 1 << bits - 1

    def dequantize(rows: slice) -> Tensor:
        with one_torch_thread():
            scales = scale.read().to(torch.float32)
            # Packed along the rows: (words of d values, groups).
            stored_zeros = None if zero_point is None else codes(as_bytes(zero_point.read().T), bits, d)
            all_zeros = None if stored_zeros is None else stored_zeros.T.to(torch.float32) - half
        group = g_idx.read().long() if g_idx is not None else torch.arange(k) // (k // groups)
        simple = bits == 4 and g_idx is None and k % (2 * groups) == 0 and packed.shape[1] * 8 == k

        def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor]) -> None:
            factors = _rows_of(scales, own).expand(len(out), -1)
            zeros = torch.zeros(factors.shape, dtype=torch.float32) if all_zeros is None else _rows_of(all_zeros, own)
            if simple:
                decode_integers(as_bytes(read(own)), bits, factors, zeros + half, out)
                return
            values = codes(as_bytes(read(own)), bits, k).to(torch.float32) - half
            out.copy_((values - zeros[:, group]).mul_(factors[:, group]))

        return in_strips(rows, k, dtype, fill, [packed])

    stored = {"weight_packed": packed, "weight_scale": scale}
    stored |= {part: module.tensors[part] for part in ("weight_zero_point", "weight_g_idx") if part in module.tensors}
    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=dtype,
        dequantization=f"compressed-tensors int{bits}, {groups} groups a row",
        stored=stored,
        dequantize=dequantize,
    )


def _rows_of(scale: Tensor, rows: slice) -> Tensor:
    """The rows' own scales; a single scale applies to all rows."""
    scale = scale.reshape(-1, scale.shape[1] if scale.ndim == 2 else 1)
    return scale if len(scale) == 1 else scale[rows]
