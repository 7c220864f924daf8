"""Dequantization of llama.cpp's most frequent block types, to the bit as gguf's numpy code computes them.

Each kernel reads row pick[i] of `raw` (rows, bytes), uint8, and writes row i of `out` (rows, k), float32. All
arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

from .blocks import put_q4_k, put_q6_k, put_q8_0
from .elements import from_half, get
from .jit import njit
from .simd import LOADS_FLOAT16


def decoder(kind: str) -> Any:
    """The kernel for blocks of the type that GGML calls by this name; None if there is none, or not on this machine."""
    kernels = {"Q8_0": decode_q8_0, "Q4_K": decode_q4_k, "Q6_K": decode_q6_k}
    return kernels.get(kind) if LOADS_FLOAT16 else None


@njit(cache=True, nogil=True)
def decode_q8_0(raw: Any, pick: Any, out: Any) -> None:
    """q · d. A block of 32 values: d in float16, 32 int8. Reads 34 bytes for every 128 that it writes."""
    flat, result, k = raw.reshape(raw.size), out.reshape(out.size), out.shape[1]
    for i in range(len(pick)):
        for block in range(k // 32):
            at = pick[i] * raw.shape[1] + 34 * block
            put_q8_0(flat, at + 2, from_half(get(flat, at), get(flat, at + 1)), result, i * k + 32 * block)


@njit(cache=True, nogil=True)
def decode_q4_k(raw: Any, pick: Any, out: Any) -> None:
    """(d · scale) · q − (dmin · min). A block of 256 values, with 6-bit scales and minima for each 32 of them.

    d, dmin in float16, 12 bytes of scales and minima, 128 bytes of codes: of 64 values in turn, 32 in the low halves
    and 32 in the high ones. Reads 144 bytes for every 1,024 that it writes.
    """
    flat, result, k = raw.reshape(raw.size), out.reshape(out.size), out.shape[1]
    for i in range(len(pick)):
        for block in range(k // 256):
            at = pick[i] * raw.shape[1] + 144 * block
            d, dmin = from_half(get(flat, at), get(flat, at + 1)), from_half(get(flat, at + 2), get(flat, at + 3))
            put_q4_k(flat, at + 4, d, dmin, result, i * k + 256 * block)


@njit(cache=True, nogil=True)
def decode_q6_k(raw: Any, pick: Any, out: Any) -> None:
    """(d · scale) · (q − 32). A block of 256 values, with an int8 scale for each 16 of them.

    Low and high bits of the codes, scales, d in float16. Reads 210 bytes for every 1,024 that it writes.
    """
    flat, result, k = raw.reshape(raw.size), out.reshape(out.size), out.shape[1]
    for i in range(len(pick)):
        for block in range(k // 256):
            at = pick[i] * raw.shape[1] + 210 * block
            d = from_half(get(flat, at + 208), get(flat, at + 209))
            put_q6_k(flat, at, d, result, i * k + 256 * block)
