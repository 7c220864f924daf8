"""bitsandbytes' 4 bits (NF4 and FP4, with or without double quantization) and 8 bits.

4 bits   W = code[weight] · absmax, a scale for each block of a row; absmax, which double quantization stores in 8
         bits itself, by the library's own functions, as everything is where blocks cross rows
8 bits   W = weight · SCB / 127, a scale for each row
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from .weight import StoredModule, StoredWeight, as_bytes, decode_bytes, decode_pairs, in_strips, library, unreadable

_STATE = "weight.quant_state.bitsandbytes__"
# The library multiplies by the float nearest to 1/127.
_ONE_127TH = 7.874015718698502e-3


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    if module.has("weight", "weight.absmax"):
        return _four_bits(module)
    if module.has("weight", "SCB"):
        return _eight_bits(module)
    return None


def _four_bits(module: StoredModule) -> StoredWeight:
    state = next((part for part in module.tensors if part.startswith(_STATE)), None)
    if state is None:
        return unreadable(module, "bitsandbytes' quant_state is missing next to it")
    record = json.loads(bytes(module.tensors[state].read().tolist()))
    shape, dtype = tuple(record["shape"]), getattr(torch, record["dtype"])
    if len(shape) != 2:
        return unreadable(module, f"its quant_state says it has the shape {shape}")

    weight = module.tensors["weight"]
    words = shape[1] // 2 // weight.dtype.itemsize  # of the stored values, in a row

    def dequantize(rows: slice) -> Tensor:
        functional = library("bitsandbytes.functional", module)
        companions = {f"{part}": module.tensors[part].read() for part in module.tensors if part.startswith("weight.")}
        quant_state = functional.QuantState.from_dict(companions, device=torch.device("cpu"))
        size = quant_state.blocksize
        if shape[1] % size or size % 16 or weight.shape != (shape[0] * words, 1):
            values: Tensor = functional.dequantize_4bit(weight.read(), quant_state)
            return values[rows] if rows != slice(0, shape[0]) else values
        scale = quant_state.absmax
        if quant_state.nested:
            scale = functional.dequantize_blockwise(scale, quant_state.state2) + quant_state.offset
        scale = scale.view(shape[0], -1)

        def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor]) -> None:
            packed = as_bytes(read(slice(own.start * words, own.stop * words))).view(len(out), -1)
            decode_pairs(packed, quant_state.code, size, scale[own], out)

        return in_strips(rows, shape[1], dtype, fill, [weight])

    nested = ", double quantization" if module.has("weight.nested_absmax") else ""
    return StoredWeight(
        name=f"{module.name}.weight",
        shape=shape,
        dtype=dtype,
        dequantization=f"bitsandbytes {state.removeprefix(_STATE)}{nested}",
        stored={part: tensor for part, tensor in module.tensors.items() if part.partition(".")[0] == "weight"},
        dequantize=dequantize,
    )


def _eight_bits(module: StoredModule) -> StoredWeight:
    weight, scale = module.tensors["weight"], module.tensors["SCB"]
    if weight.dtype != torch.int8 or len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
        return unreadable(module, f"its weight {weight.shape} and SCB {scale.shape} are not bitsandbytes' 8 bits")
    shape = (weight.shape[0], weight.shape[1])

    def fill(own: slice, out: Tensor, read: Callable[[slice], Tensor], read_scale: Callable[[slice], Tensor]) -> None:
        # The library multiplies by the row's scale first, then by 1/127.
        values = torch.empty(out.shape, dtype=torch.float32)
        decode_bytes(read(own), read_scale(own).unsqueeze(1), shape[1], values)
        out.copy_(values.mul_(_ONE_127TH))

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=shape,
        dtype=module.dtype,
        dequantization="bitsandbytes int8",
        stored={"weight": weight, "SCB": scale},
        dequantize=lambda rows: in_strips(rows, shape[1], module.dtype, fill, [weight, scale]),
    )
