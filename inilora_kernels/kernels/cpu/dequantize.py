"""Dequantization of stored weights, a strip of rows at a time: each value is computed once, in one pass over the codes.

All write float32; the formats round to their own dtype, as their libraries do.
"""

from __future__ import annotations

from numpy import float32
from numpy.typing import NDArray

from .jit import njit

# numba's arrays.
Array = NDArray[float32]


@njit(cache=True, nogil=True)
def decode_bytes(codes: Array, table: Array, scale: Array, width: int, out: Array) -> None:
    """out[i, j] = table[codes[i, j]] · scale[i, j // width].

    codes: (rows, k) uint8. table: (256,). scale: (rows, ⌈k / width⌉). Reads one byte for every 4 that it writes.
    """
    rows, k = codes.shape
    for i in range(rows):
        for group in range(scale.shape[1]):
            factor = scale[i, group]
            for j in range(group * width, min((group + 1) * width, k)):
                out[i, j] = table[codes[i, j]] * factor


@njit(cache=True, nogil=True)
def decode_nibbles(packed: Array, table: Array, offset: Array, scale: Array, out: Array) -> None:
    """out[i, j] = (table[code[i, j]] − offset[i, group]) · scale[i, group], two codes a byte, the low half first.

    packed: (rows, k / 2) uint8. table: (16,). offset, scale: (rows, groups), each group of k / groups values, an even
    number. Reads half a byte for every 4 that it writes.
    """
    rows, groups = scale.shape
    width = packed.shape[1] // groups
    for i in range(rows):
        for group in range(groups):
            factor, less = scale[i, group], offset[i, group]
            for j in range(group * width, (group + 1) * width):
                code = packed[i, j]
                out[i, 2 * j] = (table[code & 15] - less) * factor
                out[i, 2 * j + 1] = (table[code >> 4] - less) * factor


@njit(cache=True, nogil=True)
def decode_words_along_k(words: Array, offset: Array, scale: Array, group_of: Array, out: Array) -> None:
    """GPTQ: out[j, i] = (code[i, j] − offset[g, j]) · scale[g, j] with g = group_of[i], stored transposed.

    words: (k / 8, columns) int32, each with 8 codes of 4 bits, neighbours along k. offset, scale: (groups, columns).
    out: (columns, k). A column's words are in the first-level cache once its neighbours have been read.
    """
    for j in range(words.shape[1]):
        for place in range(words.shape[0]):
            word = words[place, j]
            for n in range(8):
                i = 8 * place + n
                g = group_of[i]
                out[j, i] = (float32((word >> (4 * n)) & 15) - offset[g, j]) * scale[g, j]


@njit(cache=True, nogil=True)
def decode_words_along_columns(
    words: Array, offset: Array, scale: Array, group_of: Array, shifts: Array, out: Array
) -> None:
    """AWQ: out[j, i] = (code[i, j] − offset[g, j]) · scale[g, j] with g = group_of[i], stored transposed.

    words: (k, columns / 8) int32, each with 8 codes of 4 bits, neighbours along the columns; the n-th begins at bit
    shifts[n]. offset, scale: (groups, columns). out: (columns, k).
    """
    for place in range(words.shape[1]):
        for n in range(8):
            j, shift = 8 * place + n, shifts[n]
            for i in range(words.shape[0]):
                g = group_of[i]
                out[j, i] = (float32((words[i, place] >> shift) & 15) - offset[g, j]) * scale[g, j]
