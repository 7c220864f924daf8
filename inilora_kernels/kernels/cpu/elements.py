"""Single elements of flat arrays in the forms that weights are stored in; loops over them are vectorized by LLVM."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_INT32 = ir.IntType(32)
_INT16 = ir.IntType(16)
# Of 32 bits, a line of the cache.
TILE = 16


def _intrinsic(function: Any) -> Any:
    """numba's decorator; its result is only called from compiled code, without the typing context."""
    return intrinsic(function)


def place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The address of an element of an array."""
    # By a pointer that LLVM can follow, so that it can prove what does not overlap.
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(data, [index])


@_intrinsic
def get(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as stored; an index is never negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(place(context, builder, array, *arguments))

    return array.dtype(array, types.intp), generate


@_intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = a float32, rounded to nearest even; uint16 holds bfloat16's bits, int16 float16's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, number = arguments
        builder.store(round_to(builder, array.dtype, number), place(context, builder, array, array_value, index))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@_intrinsic
def rounded(typing: Any, array: Any, value: Any) -> Any:
    """A float32 rounded to what the array holds, see `put`, and back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, array.dtype, round_to(builder, array.dtype, arguments[1]))

    return types.float32(array, types.float32), generate


@_intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    """The float32 with these bits (int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@_intrinsic
def from_half(typing: Any, low: Any, high: Any) -> Any:
    """The float16 stored in these two bytes (uint8), as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second = (builder.zext(byte, _INT16) for byte in arguments)
        bits = builder.or_(first, builder.shl(second, _INT16(8)))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), _FLOAT)

    return types.float32(types.uint8, types.uint8), generate


@_intrinsic
def nibble(typing: Any, word: Any, shift: Any) -> Any:
    """The four bits of a word (int32) from this one on, as float32; numba's own operators would take 64-bit ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.and_(builder.lshr(*arguments), _INT32(15)), _FLOAT)

    return types.float32(types.int32, types.int32), generate


@_intrinsic
def holds_bfloat16(typing: Any, array: Any) -> Any:
    """Whether the array holds bfloat16's bits, known to the compiler."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(array.dtype == types.uint16))

    return types.boolean(array), generate


@_intrinsic
def transpose_tile(typing: Any, source: Any, first: Any, stride: Any, result: Any, to: Any, result_stride: Any) -> Any:
    """result[to + j · result_stride + i] = source[first + i · stride + j] for i, j < TILE, of flat arrays of int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_array, at, step, result_array, to, result_step = arguments
        pointer = ir.VectorType(_INT32, TILE).as_pointer()

        def row(kind: Any, array: Any, first: Any, step: Any, i: int) -> Any:
            index = builder.add(first, builder.mul(step, ir.Constant(step.type, i)))
            return builder.bitcast(place(context, builder, kind, array, index), pointer)

        rows = [builder.load(row(source, source_array, at, step, i), align=4) for i in range(TILE)]
        for j, column in enumerate(transposed(builder, rows)):
            builder.store(column, row(result, result_array, to, result_step, j), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, result, types.intp, types.intp), generate


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """TILE vectors of TILE elements each, transposed.

    In log₂ TILE rounds each pair of vectors whose numbers differ in one bit swaps the elements whose places differ in
    it.
    """
    rows, bit = list(rows), 1
    while bit < TILE:
        kept = [lane if not lane & bit else TILE + lane - bit for lane in range(TILE)]
        moved = [lane + bit if not lane & bit else TILE + lane for lane in range(TILE)]
        for i in range(TILE):
            if not i & bit:
                rows[i], rows[i | bit] = (
                    builder.shuffle_vector(rows[i], rows[i | bit], ir.Constant(ir.VectorType(_INT32, TILE), lanes))
                    for lanes in (kept, moved)
                )
        bit *= 2
    return rows


def round_to(builder: Any, dtype: Any, number: Any) -> Any:
    """A float32, or a vector of them, in the form in which an array of this dtype holds it, see `put`."""
    lanes = getattr(number.type, "count", 0)

    def kind(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes else element

    def constant(value: int) -> Any:
        return ir.Constant(kind(_INT32), [value] * lanes if lanes else value)

    if dtype == types.uint16:
        bits = builder.bitcast(number, kind(_INT32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
        is_number = builder.fcmp_ordered("ord", number, number)
        return builder.trunc(builder.select(is_number, nearest, constant(0x7FC0)), kind(_INT16))
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(number, kind(ir.HalfType())), kind(_INT16))
    return number


def widened(builder: Any, dtype: Any, stored: Any) -> Any:
    """What an array of this dtype holds, or a vector of it, as float32."""
    lanes = getattr(stored.type, "count", 0)

    def kind(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes else element

    if dtype == types.uint16:
        sixteen = ir.Constant(kind(_INT32), [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(builder.zext(stored, kind(_INT32)), sixteen), kind(_FLOAT))
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(stored, kind(ir.HalfType())), kind(_FLOAT))
    return stored
