"""Single elements of flat arrays in the forms that weights are stored in; loops over them are vectorized by LLVM."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_INT32 = ir.IntType(32)
_INT16 = ir.IntType(16)
# int32 in a line of the cache.
TILE = 16


def _intrinsic(function: Any) -> Any:
    """numba's decorator; its result is only called from compiled code, without the typing context."""
    return intrinsic(function)


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    # By a pointer that LLVM can follow, so that it can prove what does not overlap.
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.gep(data, [index])


@_intrinsic
def get(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as stored; an index is never negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, array, *arguments))

    return array.dtype(array, types.intp), generate


@_intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = a float32, rounded to nearest even; uint16 holds bfloat16's bits, int16 float16's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, place, number = arguments
        builder.store(_rounded(builder, array.dtype, number), _place(context, builder, array, array_value, place))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@_intrinsic
def rounded(typing: Any, array: Any, value: Any) -> Any:
    """A float32 rounded to what the array holds, see `put`, and back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widened(builder, array.dtype, _rounded(builder, array.dtype, arguments[1]))

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
def transpose_tile(typing: Any, source: Any, first: Any, stride: Any, result: Any, to: Any, result_stride: Any) -> Any:
    """result[to + j · result_stride + i] = source[first + i · stride + j] for i, j < TILE, of flat arrays of int32.

    Rows are vectors; in log₂ TILE rounds each pair of rows whose numbers differ in one bit swaps the elements whose
    places differ in it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_array, at, step, result_array, place, result_step = arguments
        vector = ir.VectorType(_INT32, TILE)

        def row(kind: Any, array: Any, first: Any, step: Any, i: int) -> Any:
            index = builder.add(first, builder.mul(step, ir.Constant(step.type, i)))
            return builder.bitcast(_place(context, builder, kind, array, index), vector.as_pointer())

        rows = [builder.load(row(source, source_array, at, step, i), align=4) for i in range(TILE)]
        bit = 1
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
        for j in range(TILE):
            builder.store(rows[j], row(result, result_array, place, result_step, j), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, result, types.intp, types.intp), generate


def _rounded(builder: Any, dtype: Any, number: Any) -> Any:
    if dtype == types.uint16:
        bits = builder.bitcast(number, _INT32)
        odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, _INT32(0x7FFF))), _INT32(16))
        is_number = builder.fcmp_ordered("ord", number, number)
        return builder.trunc(builder.select(is_number, nearest, _INT32(0x7FC0)), _INT16)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _INT16)
    return number


def _widened(builder: Any, dtype: Any, stored: Any) -> Any:
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(stored, _INT32), _INT32(16)), _FLOAT)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(stored, ir.HalfType()), _FLOAT)
    return stored
