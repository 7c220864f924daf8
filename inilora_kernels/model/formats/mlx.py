"""MLX's affine quantization: integers of 2 to 8 bits, a scale and a bias for each group of a row.

W = codes(weight) · scales + biases                                   rounded to the scales' dtype after each step
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .weight import StoredModule, StoredWeight, as_bytes, codes, decode_affine, in_strips, scaled, unreadable


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in this format; None of any other."""
    if not module.has("weight", "scales") or module.tensors["weight"].dtype != torch.uint32:
        return None
    weight, scales, biases = module.tensors["weight"], module.tensors["scales"], module.tensors.get("biases")
    stated = module.quantization.get(module.name, {})
    settings = {**module.quantization, **(stated if isinstance(stated, dict) else {})}
    size = settings.get("group_size")
    if biases is None or settings.get("mode", "affine") != "affine" or not isinstance(size, int):
        return unreadable(module, f"only MLX's affine quantization can be read, not {settings.get('mode')!r}")
    if len(weight.shape) != 2 or scales.shape != biases.shape:
        return unreadable(module, f"its weight has the shape {weight.shape}, its scales {scales.shape}")
    d, k = weight.shape[0], scales.shape[1] * size
    bits, rest = divmod(32 * weight.shape[1], k)
    if rest or not 2 <= bits <= 8:
        return unreadable(module, f"its weight {weight.shape} and scales {scales.shape} do not fit groups of {size}")

    def fill(own: slice, out: Tensor, *read: Callable[[slice], Tensor]) -> None:
        words, scale, bias = (each(own) for each in read)
        packed = as_bytes(words)
        if bits in (4, 8):
            decode_affine(packed, bits, scale, bias, out)
            return
        product = scaled(codes(packed, bits, k), scale).to(scale.dtype)
        out.copy_(product.view(-1, k // size, size).add_(bias.unsqueeze(-1)).view(-1, k))

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=scales.dtype,
        dequantization=f"mlx int{bits}, groups of {size}",
        stored={"weight": weight, "scales": scales, "biases": biases},
        dequantize=lambda rows: in_strips(rows, k, scales.dtype, fill, [weight, scales, biases]),
    )
