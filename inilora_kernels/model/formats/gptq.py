"""GPTQ and AWQ: integers of a few bits, packed into 32-bit words, with a scale and a zero point for each group.

    W = (codes(qweight) − zeros(qzeros)) · scales                  qweight is stored transposed: in_features first

GPTQ packs along in_features and stores each zero point less 1 (but not in its format "gptq_v2"); g_idx says which group
a column is in. AWQ packs along out_features, the eight codes of a word in an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import StoredModule, StoredWeight, as_bytes, codes, decode_transposed, in_strips, nibbles, unreadable

# The position within its word of each of eight neighbours.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in one of these formats; None of any other."""
    if not module.has("qweight", "qzeros", "scales"):
        return None
    method = str(module.quantization.get("quant_method"))
    qweight, scales = module.tensors["qweight"], module.tensors["scales"]
    if len(qweight.shape) != 2 or len(scales.shape) != 2 or qweight.dtype != torch.int32:
        return unreadable(module, f"its qweight is {qweight.dtype} of shape {qweight.shape}")
    if method == "awq" and scales.shape[1] == 8 * qweight.shape[1]:
        return _awq(module)
    if method == "gptq" and scales.shape[1] == qweight.shape[1]:
        return _gptq(module)
    return unreadable(
        module,
        f"quant_method {method!r} with a qweight of {qweight.shape} and scales of {scales.shape} is neither GPTQ's nor "
        f"AWQ's layout",
    )


def _gptq(module: StoredModule) -> StoredWeight:
    qweight, qzeros, scales = (module.tensors[part] for part in ("qweight", "qzeros", "scales"))
    g_idx = module.tensors.get("g_idx")
    bits = int(module.quantization.get("bits", 4))
    (groups, d), k = scales.shape, qweight.shape[0] * 32 // bits
    if qweight.shape[0] * 32 % bits or qzeros.shape != (groups, -(-d * bits // 32)) or (k % groups and g_idx is None):
        return unreadable(module, f"its qweight {qweight.shape} and qzeros {qzeros.shape} do not fit {bits} bits")
    stored_less = 0 if module.quantization.get("checkpoint_format") == "gptq_v2" else 1

    def dequantize_all(rows: slice) -> Tensor:
        words, scale = qweight.read(), scales.read().to(torch.float32)
        zeros = (codes(as_bytes(qzeros.read()), bits, d) + stored_less & (1 << bits) - 1).to(torch.float32)
        group = g_idx.read().long() if g_idx is not None else torch.arange(k) // (k // groups)

        def dequantize(own: slice) -> Tensor:
            if bits == 4:
                return decode_transposed(words[:, own], scale[:, own], zeros[:, own], group)
            values = codes(as_bytes(words[:, own].T), bits, k).to(torch.float32)
            return values.sub_(zeros[:, own].T[:, group]).mul_(scale[:, own].T[:, group])

        return in_strips((d, k), scales.dtype, dequantize)(rows)

    parts = ("qweight", "qzeros", "scales", "g_idx")
    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=scales.dtype,
        dequantization=f"gptq int{bits}, zero points stored less {stored_less}, {groups} groups",
        stored={part: module.tensors[part] for part in parts if part in module.tensors},
        dequantize=dequantize_all,
    )


def _awq(module: StoredModule) -> StoredWeight:
    qweight, qzeros, scales = (module.tensors[part] for part in ("qweight", "qzeros", "scales"))
    (groups, d), k = scales.shape, qweight.shape[0]
    if module.quantization.get("bits", 4) != 4 or k % groups or qzeros.shape != (groups, d // 8):
        return unreadable(module, f"its qweight {qweight.shape} and qzeros {qzeros.shape} are not AWQ's 4 bits")

    def dequantize_all(rows: slice) -> Tensor:
        words, scale = qweight.read(), scales.read().to(torch.float32)
        zeros = nibbles(as_bytes(qzeros.read())).view(groups, -1, 8)[:, :, _AWQ_ORDER].flatten(1).to(torch.float32)
        group = torch.arange(k) // (k // groups)

        def dequantize(own: slice) -> Tensor:
            # Whole words of eight rows each.
            first, last = own.start // 8, -(-own.stop // 8)
            every, shifts = slice(8 * first, 8 * last), [4 * place for place in _AWQ_ORDER]
            values = decode_transposed(words[:, first:last], scale[:, every], zeros[:, every], group, shifts)
            return values[own.start - every.start : own.stop - every.start]

        return in_strips((d, k), scales.dtype, dequantize)(rows)

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=scales.dtype,
        dequantization=f"awq int4, {groups} groups",
        stored={"qweight": qweight, "qzeros": qzeros, "scales": scales},
        dequantize=dequantize_all,
    )
