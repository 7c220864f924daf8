"""Dequantization of stored weights, rows at a time: each value is computed once and written in the result's own dtype.

The products are float32's, rounded once to `out`, whose elements are float32, bfloat16's bits (uint16) or float16's
(int16; see `rounds_to`). All arrays are contiguous. A row's scales are first spread over its values in a buffer that
stays in the first-level cache: then one loop without branches decodes the row, as wide as the machine's vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import float32, int32

from .elements import TILE, from_bits, get, put, rounded, transpose_tile
from .jit import njit
from .simd import LOADS_FLOAT16


def rounds_to(dtype: torch.dtype) -> bool:
    """Whether the kernels write this dtype; float16 only where the machine has an instruction for it."""
    return dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and LOADS_FLOAT16)


@njit(cache=True, nogil=True)
def decode_e4m3(codes: Any, width: int, scale: Any, out: Any) -> None:
    """out[i, j] = e4m3(codes[i, j]) · scale[i, j // width]: 8-bit floats without infinities.

    codes: (rows, k) uint8. scale: (rows, ⌈k / width⌉). Reads one byte for each value that it writes.
    """
    rows, k = codes.shape
    flat, result, wide = codes.reshape(codes.size), out.reshape(out.size), np.empty(k, np.float32)
    for i in range(rows):
        _spread(scale, i, width, wide)
        for j in range(k):
            put(result, i * k + j, _e4m3(get(flat, i * k + j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_bytes(codes: Any, table: Any, width: int, scale: Any, out: Any) -> None:
    """out[i, j] = table[codes[i, j]] · scale[i, j // width].

    codes: (rows, k) uint8. table: (256,). scale: (rows, ⌈k / width⌉). Reads one byte for each value that it writes.
    """
    rows, k = codes.shape
    flat, result, wide = codes.reshape(codes.size), out.reshape(out.size), np.empty(k, np.float32)
    for i in range(rows):
        _spread(scale, i, width, wide)
        for j in range(k):
            put(result, i * k + j, get(table, get(flat, i * k + j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_e2m1(packed: Any, width: int, scale: Any, out: Any) -> None:
    """out[i, j] = e2m1(code[i, j]) · scale[i, j // width]: 4-bit floats, two a byte, the low half first.

    packed: (rows, k / 2) uint8. scale: (rows, k / width); width is even. Reads half a byte for each value that it
    writes.
    """
    rows, half = packed.shape
    flat, result, wide = packed.reshape(packed.size), out.reshape(out.size), np.empty(half, np.float32)
    for i in range(rows):
        _spread(scale, i, width // 2, wide)
        for j in range(half):
            codes, factor = get(flat, i * half + j), get(wide, j)
            put(result, 2 * (i * half + j), _e2m1(codes & 15) * factor)
            put(result, 2 * (i * half + j) + 1, _e2m1(codes >> 4) * factor)


@njit(cache=True, nogil=True)
def decode_integers(packed: Any, bits: int, group_of: Any, offset: Any, scale: Any, out: Any) -> None:
    """out[i, j] = (code[i, j] − offset[i, g]) · scale[i, g] with g = group_of[j].

    packed: (rows, k · bits / 8) uint8, bits 4 (the low half first) or 8. group_of: (k,), in any order; if empty, the
    groups are neighbours of k / groups values. offset, scale: (rows, groups). Reads bits / 8 bytes for each value that
    it writes.
    """
    rows, groups = scale.shape
    k = out.shape[1]
    flat, result = packed.reshape(packed.size), out.reshape(out.size)
    codes, less, wide = np.empty(k, np.uint8), np.empty(k, np.float32), np.empty(k, np.float32)
    # Both numbers of a group side by side, so that a column's are fetched at once.
    pairs, fetched = np.empty(groups, np.float64), np.empty(k if len(group_of) else 0, np.float64)
    both, both_fetched = pairs.view(np.float32), fetched.view(np.float32)
    for i in range(rows):
        _unpack(flat, i, bits, codes)
        if len(group_of):
            for g in range(groups):
                both[2 * g] = offset[i, g]
                both[2 * g + 1] = scale[i, g]
            for j in range(k):
                fetched[j] = get(pairs, get(group_of, j))
            for j in range(k):
                value = (float32(get(codes, j)) - get(both_fetched, 2 * j)) * get(both_fetched, 2 * j + 1)
                put(result, i * k + j, value)
            continue
        _spread(offset, i, k // groups, less)
        _spread(scale, i, k // groups, wide)
        for j in range(k):
            put(result, i * k + j, (float32(get(codes, j)) - get(less, j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_affine(packed: Any, bits: int, scale: Any, bias: Any, out: Any) -> None:
    """MLX: out[i, j] = code[i, j] · scale[i, g] + bias[i, g], the product rounded to out's dtype too.

    packed: (rows, k · bits / 8) uint8, bits 4 (the low half first) or 8. scale, bias: (rows, groups), for
    k / groups neighbours each. Reads bits / 8 bytes for each value that it writes.
    """
    rows, groups = scale.shape
    k = out.shape[1]
    flat, result = packed.reshape(packed.size), out.reshape(out.size)
    codes, more, wide = np.empty(k, np.uint8), np.empty(k, np.float32), np.empty(k, np.float32)
    for i in range(rows):
        _spread(bias, i, k // groups, more)
        _spread(scale, i, k // groups, wide)
        _unpack(flat, i, bits, codes)
        for j in range(k):
            put(result, i * k + j, rounded(result, float32(get(codes, j)) * get(wide, j)) + get(more, j))


@njit(cache=True, nogil=True)
def decode_words(words: Any, shifts: Any, skip: int, offset: Any, scale: Any, out: Any) -> None:
    """AWQ: out[i, j] = (code[i, j] − offset[i, g]) · scale[i, g], with row i + skip's codes in words of eight rows.

    words: (words, k) int32, (i + skip) // 8 is row i's. shifts: (8,), the bit at which each row's code begins.
    offset, scale: (rows, groups), for k / groups neighbours each. Reads four bytes, in the cache but for every eighth
    row, for each value that it writes.
    """
    rows, groups = scale.shape
    k = out.shape[1]
    flat, result = words.reshape(words.size), out.reshape(out.size)
    less, wide = np.empty(k, np.float32), np.empty(k, np.float32)
    for i in range(rows):
        _spread(offset, i, k // groups, less)
        _spread(scale, i, k // groups, wide)
        first, shift = (i + skip) // 8 * k, int32(shifts[(i + skip) % 8])
        for j in range(k):
            code = int32(int32(get(flat, first + j) >> shift) & int32(15))
            put(result, i * k + j, (float32(code) - get(less, j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_pairs(packed: Any, table: Any, width: int, scale: Any, out: Any) -> None:
    """bitsandbytes: out[i, j] = value[code[i, j]] · scale[i, j // width], two codes a byte, the high half first.

    packed: (rows, k / 2) uint8. table: (256,) float64, each the two float32 values of a byte. scale: (rows, k / width).
    Reads half a byte for each value that it writes.
    """
    rows, half = packed.shape
    flat, result, wide = packed.reshape(packed.size), out.reshape(out.size), np.empty(2 * half, np.float32)
    pairs = np.empty(half, np.float64)
    values = pairs.view(np.float32)
    for i in range(rows):
        _spread(scale, i, width, wide)
        for j in range(half):
            pairs[j] = get(table, get(flat, i * half + j))
        for j in range(2 * half):
            put(result, 2 * i * half + j, get(values, j) * get(wide, j))


@njit(cache=True, nogil=True)
def transpose_words(words: Any, first: int, out: Any) -> None:
    """out[j, i] = words[i, first + j], int32, in tiles of TILE×TILE words; what is left at the edges, one by one."""
    count, rows = out.shape
    flat, result = words.reshape(words.size), out.reshape(out.size)
    wide, high = count - count % TILE, rows - rows % TILE
    for j in range(0, wide, TILE):
        for i in range(0, high, TILE):
            transpose_tile(flat, i * words.shape[1] + first + j, words.shape[1], result, j * rows + i, rows)
    for j in range(count):
        for i in range(high if j < wide else 0, rows):
            out[j, i] = words[i, first + j]


@njit(nogil=True, inline="always")
def _spread(scale: Any, i: int, width: int, wide: Any) -> None:
    """Row i of `scale`, each entry repeated `width` times; the last one may be cut off."""
    for group in range(scale.shape[1]):
        factor = scale[i, group]
        for j in range(group * width, min((group + 1) * width, len(wide))):
            put(wide, j, factor)


@njit(nogil=True, inline="always")
def _unpack(flat: Any, i: int, bits: int, codes: Any) -> None:
    """The codes of row i, one a byte."""
    k = len(codes)
    if bits == 8:
        for j in range(k):
            codes[j] = get(flat, i * k + j)
        return
    half = k // 2
    for j in range(half):
        both = get(flat, i * half + j)
        codes[2 * j] = both & 15
        codes[2 * j + 1] = both >> 4


# Both formats lack what float32 has for small numbers, and some users have it flushed to zero: so no product with a
# subnormal number, but one of an integer.
@njit(nogil=True, inline="always")
def _e4m3(code: Any) -> Any:
    magnitude = int32(code) & 0x7F
    value = from_bits(int32((magnitude << 20) + (120 << 23))) if magnitude >= 8 else float32(magnitude) * float32(2**-9)
    value = value if magnitude != 0x7F else from_bits(int32(0x7FC00000))
    return -value if int32(code) & 0x80 else value


@njit(nogil=True, inline="always")
def _e2m1(code: Any) -> Any:
    magnitude = int32(code) & 7
    value = from_bits(int32((magnitude << 22) + (126 << 23))) if magnitude >= 2 else float32(magnitude) * float32(0.5)
    return -value if int32(code) & 8 else value
