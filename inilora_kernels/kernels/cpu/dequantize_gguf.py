"""Dequantization of llama.cpp's most frequent block types, to the bit as gguf's numpy code computes them.

Each kernel reads row pick[i] of `raw` (rows, bytes), uint8, and writes row i of `out` (rows, k), float32. All
arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int8, int32

from .elements import from_half, get, put
from .jit import njit
from .simd import LOADS_FLOAT16


def decoder(kind: str) -> Any:
    """The kernel for blocks of the type that GGML calls by this name; None if there is none, or not on this machine."""
    kernels = {"Q8_0": decode_q8_0, "Q4_K": decode_q4_k, "Q6_K": decode_q6_k}
    return kernels.get(kind) if LOADS_FLOAT16 else None


@njit(cache=True, nogil=True)
def decode_q8_0(raw: Any, pick: Any, out: Any) -> None:
    """q · d. A block of 32 values: d in float16, 32 int8. Reads 34 bytes for every 128 that it writes.

    A row's codes and scales are first laid out in buffers that stay in the first-level cache: a loop for each block
    would ask each time whether it overlaps its result.
    """
    flat, result, k = raw.reshape(raw.size), out.reshape(out.size), out.shape[1]
    codes, wide = np.empty(k, np.uint8), np.empty(k, np.float32)
    for i in range(len(pick)):
        for block in range(k // 32):
            at = pick[i] * raw.shape[1] + 34 * block
            d = from_half(get(flat, at), get(flat, at + 1))
            for j in range(32):
                put(wide, 32 * block + j, d)
            for j in range(32):
                codes[32 * block + j] = get(flat, at + 2 + j)
        for j in range(k):
            put(result, i * k + j, float32(int8(get(codes, j))) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_q4_k(raw: Any, pick: Any, out: Any) -> None:
    """(d · scale) · q − (dmin · min). A block of 256 values, with 6-bit scales and minima for each 32 of them.

    d, dmin in float16, 12 bytes of scales and minima, 128 bytes of codes: of 64 values in turn, 32 in the low halves
    and 32 in the high ones. Reads 144 bytes for every 1,024 that it writes.
    """
    flat, result = raw.reshape(raw.size), out.reshape(out.size)
    for i in range(len(pick)):
        for block in range(out.shape[1] // 256):
            at, to = pick[i] * raw.shape[1] + 144 * block, i * out.shape[1] + 256 * block
            d, dmin = from_half(flat[at], flat[at + 1]), from_half(flat[at + 2], flat[at + 3])
            for pair in range(4):
                low, low_minimum = _scale_and_minimum(flat, at + 4, 2 * pair)
                high, high_minimum = _scale_and_minimum(flat, at + 4, 2 * pair + 1)
                low, low_minimum, high, high_minimum = d * low, dmin * low_minimum, d * high, dmin * high_minimum
                codes, place = at + 16 + 32 * pair, to + 64 * pair
                for j in range(32):
                    put(result, place + j, low * float32(get(flat, codes + j) & 15) - low_minimum)
                for j in range(32):
                    put(result, place + 32 + j, high * float32(get(flat, codes + j) >> 4) - high_minimum)


@njit(cache=True, nogil=True)
def decode_q6_k(raw: Any, pick: Any, out: Any) -> None:
    """(d · scale) · (q − 32). A block of 256 values, with an int8 scale for each 16 of them.

    128 bytes with the low 4 bits of the codes, 64 with the high 2, 16 scales, d in float16. Of 128 values in turn, the
    j-th of each quarter of 32 shares its byte of high bits with the others'. Reads 210 bytes for every 1,024 that it
    writes.
    """
    flat, result = raw.reshape(raw.size), out.reshape(out.size)
    wide = np.empty(128, np.float32)
    for i in range(len(pick)):
        for block in range(out.shape[1] // 256):
            at, to = pick[i] * raw.shape[1] + 210 * block, i * out.shape[1] + 256 * block
            d = from_half(flat[at + 208], flat[at + 209])
            for half in range(2):
                for group in range(8):
                    factor = d * float32(int8(flat[at + 192 + 8 * half + group]))
                    for j in range(16):
                        put(wide, 16 * group + j, factor)
                low, high, place = at + 64 * half, at + 128 + 32 * half, to + 128 * half
                for quarter in range(4):
                    codes, shift = low + 32 * (quarter & 1), 4 * (quarter >> 1)
                    for j in range(32):
                        q = (int32(get(flat, codes + j)) >> shift) & 15
                        q |= ((int32(get(flat, high + j)) >> (2 * quarter)) & 3) << 4
                        put(result, place + 32 * quarter + j, get(wide, 32 * quarter + j) * float32(q - 32))


@njit(nogil=True, inline="always")
def _scale_and_minimum(flat: Any, at: int, n: int) -> Any:
    """The n-th of eight pairs of 6-bit numbers in 12 bytes: the last four pairs' high bits are with the first four."""
    if n < 4:
        return float32(flat[at + n] & 63), float32(flat[at + 4 + n] & 63)
    both = flat[at + 4 + n]
    return (
        float32((both & 15) | ((flat[at + n - 4] >> 2) & 48)),
        float32((both >> 4) | ((flat[at + n] >> 2) & 48)),
    )
