"""GPTQ and AWQ: integers of a few bits, packed into 32-bit words, with a scale and a zero point for each group.

    W = (codes(qweight) − zeros(qzeros)) · scales

qweight is stored transposed, in_features first, but for AWQ's rare version "gemv", whose groups are filled up to whole
words. GPTQ packs along in_features and stores each zero point less 1 (but not in its format "gptq_v2"); g_idx says
which group a column is in. AWQ packs along out_features, the eight codes of a word in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...kernels.threads import one_torch_thread
from .weight import (
    StoredModule,
    StoredWeight,
    as_bytes,
    codes,
    decode_columns,
    decode_integers,
    decode_words,
    in_strips,
    nibbles,
    unreadable,
)

# The position within its word of each of eight neighbours.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_AWQ_SHIFTS = [4 * place for place in _AWQ_ORDER]


def find(module: StoredModule) -> StoredWeight | None:
    """The weight of a module in one of these formats; None of any other."""
    if not module.has("qweight", "qzeros", "scales"):
        return None
    method = str(module.quantization.get("quant_method"))
    qweight, scales = module.tensors["qweight"], module.tensors["scales"]
    if len(qweight.shape) != 2 or len(scales.shape) != 2 or qweight.dtype != torch.int32:
        return unreadable(module, f"its qweight is {qweight.dtype} of shape {qweight.shape}")
    if method == "awq" and str(module.quantization.get("version")).lower() == "gemv":
        return _awq_by_rows(module)
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
        with one_torch_thread():
            words, scale = qweight.read(), scales.read().to(torch.float32)
            zeros = (codes(as_bytes(qzeros.read()), bits, d) + stored_less & (1 << bits) - 1).to(torch.float32)
        in_order = torch.arange(k) // -(-k // groups)
        group = in_order if g_idx is None else g_idx.read().long()
        if group.shape != in_order.shape or not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise CheckpointError(
                f"{qweight.file}: {module.name}.g_idx names groups that its scales lack; it is damaged"
            )

        def fill(own: slice, out: Tensor) -> None:
            if bits == 4:
                decode_columns(words, own.start, group, scale, zeros, out)
                return
            values = codes(as_bytes(words[:, own].T), bits, k).to(torch.float32)
            out.copy_(values.sub_(zeros[:, own].T[:, group]).mul_(scale[:, own].T[:, group]))

        return in_strips(rows, k, scales.dtype, fill)

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
        with one_torch_thread():
            words, scale = qweight.read(), scales.read().to(torch.float32)
            zeros = nibbles(as_bytes(qzeros.read())).view(groups, -1, 8)[:, :, _AWQ_ORDER].flatten(1).to(torch.float32)

        def fill(own: slice, out: Tensor) -> None:
            decode_words(words, _AWQ_SHIFTS, own.start, scale[:, own].T, zeros[:, own].T, out)

        return in_strips(rows, k, scales.dtype, fill)

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=scales.dtype,
        dequantization=f"awq int4, {groups} groups",
        stored={"qweight": qweight, "qzeros": qzeros, "scales": scales},
        dequantize=dequantize_all,
    )


def _awq_by_rows(module: StoredModule) -> StoredWeight:
    """AutoAWQ's version "gemv": qweight (d, k / 8), codes in order; room for more groups than there are."""
    qweight, qzeros, scales = (module.tensors[part] for part in ("qweight", "qzeros", "scales"))
    (d, words), size = qweight.shape, int(module.quantization["group_size"])
    k = 8 * words
    groups = 1 if size == -1 else k // size
    fits = groups > 0 and k % groups == 0 and qzeros.shape[:1] == (d,) and scales.shape == (d, 8 * qzeros.shape[-1])
    if module.quantization.get("bits", 4) != 4 or not fits or groups > scales.shape[1]:
        return unreadable(module, f"its qweight {qweight.shape} and scales {scales.shape} are not AWQ's version gemv")

    def fill(own: slice, out: Tensor, *read: Callable[[slice], Tensor]) -> None:
        packed, zeros, scale = (one(own) for one in read)
        decode_integers(as_bytes(packed), 4, scale[:, :groups], nibbles(as_bytes(zeros))[:, :groups], out)

    return StoredWeight(
        name=f"{module.name}.weight",
        shape=(d, k),
        dtype=scales.dtype,
        dequantization=f"awq int4 by rows, {groups} groups",
        stored={"qweight": qweight, "qzeros": qzeros, "scales": scales},
        dequantize=lambda rows: in_strips(rows, k, scales.dtype, fill, [qweight, qzeros, scales]),
    )
