"""Dequantization of stored weights, rows at a time: each value is computed once and written in the result's own dtype.

The products are float32's, rounded once to `out`, whose elements are float32, bfloat16's bits (uint16) or float16's
(int16; see `rounds_to`). All arrays are contiguous. Either a row's scales are first spread over its values in a buffer
that stays in the first-level cache: then one loop without branches decodes the row, as wide as the machine's vectors.
Or sixteen values at a time are decoded by blocks.py; 4 bits have no more than sixteen, so a group's are looked up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import float32, int32

from .blocks import (
    E4M3_SIGNIFICANDS,
    SIXTEEN,
    look_up,
    look_up_high_first,
    move,
    put_affine,
    put_columns,
    put_e4m3,
    put_integers,
    put_planes,
    put_words,
)
from .elements import TILE, from_bits, get, holds_bfloat16, nibble, put, rounded, transpose_tile
from .jit import njit
from .simd import LOADS_FLOAT16

# Of a scale: no product with an 8-bit float is then a subnormal bfloat16, or infinite.
_FAR_FROM_ZERO, _FAR_FROM_INFINITY = np.float32(2.0**-100), np.float32(2.0**100)


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
    if holds_bfloat16(out) and k % SIXTEEN == 0 and (width % SIXTEEN == 0 or scale.shape[1] == 1):
        planes = np.empty(2 * SIXTEEN, np.uint8)
        for i in range(rows):
            for g in range(scale.shape[1]):
                factor, start, end = scale[i, g], i * k + g * width, i * k + min((g + 1) * width, k)
                if _FAR_FROM_ZERO <= abs(factor) <= _FAR_FROM_INFINITY:
                    put_planes(E4M3_SIGNIFICANDS, factor, result, planes)
                    for j in range(start, end, SIXTEEN):
                        put_e4m3(flat, j, planes, result, j)
                else:
                    for j in range(start, end):
                        put(result, j, _e4m3(get(flat, j)) * factor)
        return
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
def decode_tables(packed: Any, group_of: Any, planes: Any, out: Any) -> None:
    """out[i, j] = table[t][code[i, j]] with t = group_of[i, g], for k / groups neighbours, a multiple of 16.

    packed: (rows, k / 2) uint8, the low half of a byte first. group_of: (rows, groups) uint8. planes: (256 · 16 ·
    itemsize) uint8, each table's as `put_planes` writes them; 8 or 16 KiB that stay in the first-level cache. Reads
    half a byte for each value that it writes.
    """
    rows, groups = group_of.shape
    flat, result = packed.reshape(packed.size), out.reshape(out.size)
    k, size = out.shape[1], len(planes) // 256
    width = k // groups
    for i in range(rows):
        for g in range(groups):
            table = np.intp(group_of[i, g]) * size
            start = i * k + g * width
            for j in range(start, start + width, SIXTEEN):
                look_up(flat, j // 2, planes, table, result, j)


@njit(cache=True, nogil=True)
def decode_integers(packed: Any, bits: int, offset: Any, scale: Any, affine: bool, out: Any) -> None:
    """out[i, j] = (code[i, j] − offset[i, g]) · scale[i, g].

    affine, MLX's: out[i, j] = code[i, j] · scale[i, g] + offset[i, g], the product rounded to out's dtype too.
    packed: (rows, k · bits / 8) uint8, bits 4 (the low half first) or 8. offset, scale: (rows, groups), for k / groups
    neighbours each. Reads bits / 8 bytes for each value that it writes.
    """
    rows, groups = scale.shape
    k = out.shape[1]
    flat, result = packed.reshape(packed.size), out.reshape(out.size)
    width = k // groups
    if bits == 4 and width % SIXTEEN == 0:
        planes = np.empty(SIXTEEN * out.itemsize, np.uint8)
        for i in range(rows):
            for g in range(groups):
                if affine:
                    put_affine(scale[i, g], offset[i, g], result, planes)
                else:
                    put_integers(offset[i, g], scale[i, g], result, planes)
                for j in range((i * groups + g) * width, (i * groups + g + 1) * width, SIXTEEN):
                    look_up(flat, j // 2, planes, 0, result, j)
        return
    codes, other, wide = np.empty(k, np.uint8), np.empty(k, np.float32), np.empty(k, np.float32)
    for i in range(rows):
        _unpack(flat, i, bits, codes)
        _spread(offset, i, width, other)
        _spread(scale, i, width, wide)
        if affine:
            for j in range(k):
                put(result, i * k + j, rounded(result, float32(get(codes, j)) * get(wide, j)) + get(other, j))
        else:
            for j in range(k):
                put(result, i * k + j, (float32(get(codes, j)) - get(other, j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_columns(words: Any, first: int, group_of: Any, offset: Any, scale: Any, out: Any) -> None:
    """GPTQ: out[i, j] = (code[j, first + i] − offset[g, first + i]) · scale[g, first + i] with g = group_of[j].

    words: (k / 8, d) int32, word (j // 8, r) has row r's code of column j from the bit 4 (j % 8) on. group_of: (k,), in
    any order. offset, scale: (groups, d). Sixteen rows of a column at a time, whose words, offsets and scales are
    neighbours; tiles of 16×16 results are transposed. Reads half a byte for each value that it writes.
    """
    rows, k = out.shape
    groups, d = scale.shape
    flat, result = words.reshape(words.size), out.reshape(out.size)
    if rows < TILE or k < TILE:
        for i in range(rows):
            for j in range(k):
                r, g = first + i, group_of[j]
                code = nibble(words[j // 8, r], int32(4 * (j % 8)))
                put(result, i * k + j, (code - offset[g, r]) * scale[g, r])
        return
    # Two tiles side by side, so that a line of the result's 16-bit values is written at once: its rows, a power of two
    # apart, share a set of the first-level cache.
    turned = np.empty(2 * TILE * TILE, out.dtype)
    less, wide = np.empty(groups * TILE, np.float32), np.empty(groups * TILE, np.float32)
    for block in range(0, rows, TILE):
        i = min(block, rows - TILE)  # the last ones overlap
        for g in range(groups):
            for n in range(TILE):
                less[g * TILE + n] = offset[g, first + i + n]
                wide[g * TILE + n] = scale[g, first + i + n]
        for column in range(0, k, 2 * TILE):
            for half in range(2):
                j = min(column + half * TILE, k - TILE)
                at = j // 8 * d + first + i
                put_columns(flat, at, d, group_of, j, less, wide, turned, half * TILE, 2 * TILE)
            for n in range(TILE):
                move(turned, 2 * n * TILE, result, (i + n) * k + min(column, k - TILE))
                move(turned, (2 * n + 1) * TILE, result, (i + n) * k + min(column + TILE, k - TILE))


@njit(cache=True, nogil=True)
def decode_words(words: Any, shifts: Any, first: int, offset: Any, scale: Any, out: Any) -> None:
    """AWQ: out[i, j] = (code[j, first + i] − offset[i, g]) · scale[i, g].

    words: (k, d / 8) int32, word (j, r // 8) has row r's code of column j from the bit shifts[r % 8] on. offset, scale:
    (rows, groups), for k / groups neighbours each. Sixteen columns of words at a time are transposed into a buffer that
    stays in the second-level cache. Reads half a byte for each value that it writes.
    """
    rows, groups = scale.shape
    k, wide_words = words.shape
    flat, result = words.reshape(words.size), out.reshape(out.size)
    width = k // groups
    stride = k + TILE  # rows of a power of two would share a set of the cache
    turned, less, wide = np.empty(TILE * stride, np.int32), np.empty(k, np.float32), np.empty(k, np.float32)
    for word in range(first // 8, (first + rows + 7) // 8, TILE):
        count = min(TILE, wide_words - word)
        if count == TILE and k >= TILE:
            for column in range(0, k, TILE):
                j = min(column, k - TILE)  # the last ones overlap
                transpose_tile(flat, j * wide_words + word, wide_words, turned, j, stride)
        else:
            for n in range(count):
                for j in range(k):
                    turned[n * stride + j] = words[j, word + n]
        for i in range(max(0, 8 * word - first), min(rows, 8 * (word + count) - first)):
            if width % SIXTEEN == 0:
                at, shift = ((first + i) // 8 - word) * stride, int32(shifts[(first + i) % 8])
                for g in range(groups):
                    for j in range(g * width, (g + 1) * width, SIXTEEN):
                        put_words(turned, at + j, shift, offset[i, g], scale[i, g], result, i * k + j)
                continue
            _spread(offset, i, k // groups, less)
            _spread(scale, i, k // groups, wide)
            at, shift = ((first + i) // 8 - word) * stride, int32(shifts[(first + i) % 8])
            for j in range(k):
                put(result, i * k + j, (nibble(get(turned, at + j), shift) - get(less, j)) * get(wide, j))


@njit(cache=True, nogil=True)
def decode_pairs(packed: Any, values: Any, width: int, scale: Any, out: Any) -> None:
    """bitsandbytes: out[i, j] = values[code[i, j]] · scale[i, j // width], two codes a byte, the high half first.

    packed: (rows, k / 2) uint8. values: (16,). scale: (rows, k / width), width a multiple of 16. The sixteen products
    of a group are looked up. Reads half a byte for each value that it writes.
    """
    rows, groups = scale.shape
    flat, result = packed.reshape(packed.size), out.reshape(out.size)
    planes = np.empty(SIXTEEN * out.itemsize, np.uint8)
    for i in range(rows):
        for g in range(groups):
            put_planes(values, scale[i, g], result, planes)
            start = (i * groups + g) * width
            for j in range(start, start + width, SIXTEEN):
                look_up_high_first(flat, j // 2, planes, 0, result, j)


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
