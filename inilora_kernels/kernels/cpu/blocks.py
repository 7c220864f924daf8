"""Blocks of stored weights decoded as LLVM vectors, sixteen values each.

They are too short for loops: LLVM would ask before each block whether it overlaps its result. Arrays are flat, and
results are rounded as by `elements.put`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .elements import place, round_to
from .simd import BYTE_SHUFFLE

_BYTE = ir.IntType(8)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_FLOAT = ir.FloatType()
# Values in a vector.
SIXTEEN = 16


def _intrinsic(function: Any) -> Any:
    """numba's decorator; its result is only called from compiled code, without the typing context."""
    return intrinsic(function)


@_intrinsic
def put_column(
    typing: Any, words: Any, at: Any, shift: Any, offset: Any, scale: Any, first: Any, result: Any, to: Any
) -> Any:
    """result[to + n] = (code − offset[first + n]) · scale[first + n] for sixteen codes: the 4 bits of words[at + n]
    (int32) from the bit `shift` on.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words_, at_, shift_, offset_, scale_, first_, result_, to_ = arguments
        load = _loader(context, builder)
        bits = builder.lshr(load(words, words_, at_, _INT32), _splat(builder, shift_, SIXTEEN))
        codes = builder.sitofp(builder.and_(bits, _same(_INT32, 15)), _vector(_FLOAT))
        less = builder.fsub(codes, load(offset, offset_, first_, _FLOAT))
        values = builder.fmul(less, load(scale, scale_, first_, _FLOAT))
        _store(context, builder, result, result_, to_, round_to(builder, result.dtype, values))
        return context.get_dummy_value()

    index = types.intp
    return types.void(words, index, types.int32, offset, scale, index, result, index), generate


@_intrinsic
def put_planes(typing: Any, values: Any, factor: Any, like: Any, planes: Any) -> Any:
    """Sixteen values (float32) times a factor, rounded to the dtype of `like`, as `look_up` takes them.

    planes: uint8; the lowest byte of each of the sixteen, then the next byte of each, to the highest.
    """
    size = like.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_, factor_, _, planes_ = arguments
        sixteen = _loader(context, builder)(values, values_, _intp(0), _FLOAT)
        product = round_to(builder, like.dtype, builder.fmul(sixteen, _splat(builder, factor_, SIXTEEN)))
        element = ir.IntType(8 * size)
        bits = builder.bitcast(product, _vector(element))
        for byte in range(size):
            plane = builder.trunc(builder.lshr(bits, _same(element, 8 * byte)), _vector(_BYTE))
            _store(context, builder, planes, planes_, _intp(SIXTEEN * byte), plane)
        return context.get_dummy_value()

    return types.void(values, types.float32, like, planes), generate


def _look_up(typing: Any, packed: Any, at: Any, planes: Any, first: Any, result: Any, to: Any, high_first: bool) -> Any:
    size = result.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed_, at_, planes_, first_, result_, to_ = arguments
        load = _loader(context, builder)
        both = load(packed, packed_, at_, _BYTE, SIXTEEN // 2)
        low = builder.and_(both, _same(_BYTE, 15, SIXTEEN // 2))
        high = builder.lshr(both, _same(_BYTE, 4, SIXTEEN // 2))
        codes = _interleave(builder, *((high, low) if high_first else (low, high)))
        parts = [
            _shuffle_bytes(builder, load(planes, planes_, builder.add(first_, _intp(SIXTEEN * byte)), _BYTE), codes)
            for byte in range(size)
        ]
        while len(parts) > 1:  # bytes to 16 bits, those to 32
            element = ir.IntType(2 * parts[0].type.element.width)
            parts = [
                builder.bitcast(_interleave(builder, lower, upper), _vector(element))
                for lower, upper in zip(parts[::2], parts[1::2], strict=True)
            ]
        _store(context, builder, result, result_, to_, parts[0])
        return context.get_dummy_value()

    return types.void(packed, types.intp, planes, types.intp, result, types.intp), generate


@_intrinsic
def look_up(typing: Any, packed: Any, at: Any, planes: Any, first: Any, result: Any, to: Any) -> Any:
    """result[to + n] = the value whose bytes are planes[first + 16 · byte + code] for the sixteen codes of
    packed[at : at + 8], the low half of each byte first.
    """
    return _look_up(typing, packed, at, planes, first, result, to, high_first=False)


@_intrinsic
def look_up_high_first(typing: Any, packed: Any, at: Any, planes: Any, first: Any, result: Any, to: Any) -> Any:
    """`look_up` with the high half of each byte first."""
    return _look_up(typing, packed, at, planes, first, result, to, high_first=True)


# llama.cpp's blocks; results are float32.


@_intrinsic
def put_q8_0(typing: Any, flat: Any, at: Any, d: Any, result: Any, to: Any) -> Any:
    """result[to + n] = int8 flat[at + n] · d for 32 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flat_, at_, d_, result_, to_ = arguments
        factor = _splat(builder, d_, SIXTEEN)
        for n in (0, SIXTEEN):
            codes = _loader(context, builder)(flat, flat_, builder.add(at_, _intp(n)), _BYTE)
            values = builder.fmul(_signed(builder, codes), factor)
            _store(context, builder, result, result_, builder.add(to_, _intp(n)), values)
        return context.get_dummy_value()

    return types.void(flat, types.intp, types.float32, result, types.intp), generate


@_intrinsic
def put_q4_k(typing: Any, flat: Any, at: Any, d: Any, dmin: Any, result: Any, to: Any) -> Any:
    """result[to + n] = (d · scale) · code − (dmin · minimum) for the 256 codes at `at` + 12, with the 6-bit scales and
    minima of each 32 of them in the 12 bytes before.

    Bytes 0 to 3 hold the first four scales, 4 to 7 the first four minima; 8 to 11 the low halves of the last four
    scales and minima, whose high bits are the bits that the first four leave free.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flat_, at_, d_, dmin_, result_, to_ = arguments
        load = _loader(context, builder)

        def byte(value: int) -> Any:
            return _same(_BYTE, value, 4)

        first, second, third = (load(flat, flat_, builder.add(at_, _intp(4 * n)), _BYTE, 4) for n in range(3))

        def last(low: Any, free: Any) -> Any:
            return builder.or_(low, builder.and_(builder.lshr(free, byte(2)), byte(48)))

        def floats(lower: Any, upper: Any, factor: Any) -> Any:
            whole = builder.shuffle_vector(builder.and_(lower, byte(63)), upper, _lanes(range(8)))
            numbers = builder.uitofp(whole, _vector(_FLOAT, 8))
            return builder.fmul(numbers, _splat(builder, factor, 8))

        scales = floats(first, last(builder.and_(third, byte(15)), first), d_)
        minima = floats(second, last(builder.lshr(third, byte(4)), second), dmin_)
        for n in range(0, 256, SIXTEEN):
            group = n // 32
            start = 12 + 32 * (group // 2) + n % 32
            both = load(flat, flat_, builder.add(at_, _intp(start)), _BYTE)
            codes = builder.lshr(both, _same(_BYTE, 4)) if group % 2 else builder.and_(both, _same(_BYTE, 15))
            numbers = builder.uitofp(codes, _vector(_FLOAT))
            scale, minimum = (builder.shuffle_vector(own, own, _lanes([group] * SIXTEEN)) for own in (scales, minima))
            values = builder.fsub(builder.fmul(scale, numbers), minimum)
            _store(context, builder, result, result_, builder.add(to_, _intp(n)), values)
        return context.get_dummy_value()

    return types.void(flat, types.intp, types.float32, types.float32, result, types.intp), generate


@_intrinsic
def put_q6_k(typing: Any, flat: Any, at: Any, d: Any, result: Any, to: Any) -> Any:
    """result[to + n] = (d · scale) · (code − 32) for 256 values, with an int8 scale for each 16 of them.

    128 bytes with the low 4 bits of the codes, 64 with the high 2, 16 scales. Of 128 values in turn, the n-th of each
    quarter of 32 shares its byte of high bits with the others'; the third and fourth quarter are the high halves of the
    first's and second's low bits.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flat_, at_, d_, result_, to_ = arguments
        load = _loader(context, builder)

        def bytes_at(start: int) -> Any:
            return load(flat, flat_, builder.add(at_, _intp(start)), _BYTE)

        factors = builder.fmul(_splat(builder, d_, SIXTEEN), _signed(builder, bytes_at(192)))
        for n in range(0, 256, SIXTEEN):
            half, quarter, rest = n // 128, n % 128 // 32, n % 32
            low = bytes_at(64 * half + 32 * (quarter % 2) + rest)
            low = builder.lshr(low, _same(_BYTE, 4)) if quarter > 1 else builder.and_(low, _same(_BYTE, 15))
            high = builder.lshr(bytes_at(128 + 32 * half + rest), _same(_BYTE, 2 * quarter))
            high = builder.shl(builder.and_(high, _same(_BYTE, 3)), _same(_BYTE, 4))
            codes = _signed(builder, builder.sub(builder.or_(low, high), _same(_BYTE, 32)))
            factor = builder.shuffle_vector(factors, factors, _lanes([n // 16] * SIXTEEN))
            values = builder.fmul(factor, codes)
            _store(context, builder, result, result_, builder.add(to_, _intp(n)), values)
        return context.get_dummy_value()

    return types.void(flat, types.intp, types.float32, result, types.intp), generate


def _vector(element: Any, lanes: int = SIXTEEN) -> Any:
    return ir.VectorType(element, lanes)


def _same(element: Any, value: int, lanes: int = SIXTEEN) -> Any:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _lanes(numbers: Sequence[int]) -> Any:
    return ir.Constant(_vector(_INT32, len(numbers)), list(numbers))


def _intp(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    kind = _vector(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, one, _lanes([0] * lanes))


def _signed(builder: Any, codes: Any) -> Any:
    """int8 as float32."""
    return builder.sitofp(codes, _vector(_FLOAT, codes.type.count))


def _interleave(builder: Any, first: Any, second: Any) -> Any:
    lanes = first.type.count
    return builder.shuffle_vector(first, second, _lanes([n // 2 + n % 2 * lanes for n in range(2 * lanes)]))


def _loader(context: Any, builder: Any) -> Callable[..., Any]:
    def load(array_type: Any, array: Any, index: Any, element: Any, lanes: int = SIXTEEN) -> Any:
        pointer = builder.bitcast(
            place(context, builder, array_type, array, index), _vector(element, lanes).as_pointer()
        )
        return builder.load(pointer, align=array_type.dtype.bitwidth // 8)

    return load


def _store(context: Any, builder: Any, array_type: Any, array: Any, index: Any, values: Any) -> None:
    pointer = builder.bitcast(place(context, builder, array_type, array, index), values.type.as_pointer())
    builder.store(values, pointer, align=array_type.dtype.bitwidth // 8)


def _shuffle_bytes(builder: Any, table: Any, codes: Any) -> Any:
    """table[codes], sixteen bytes each; one by one where the machine has no instruction for it."""
    kind = _vector(_BYTE)
    if BYTE_SHUFFLE:
        function = ir.FunctionType(kind, [kind, kind])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, BYTE_SHUFFLE), [table, codes])
    found = ir.Constant(kind, ir.Undefined)
    for n in range(SIXTEEN):
        lane = ir.Constant(_INT32, n)
        one = builder.extract_element(table, builder.extract_element(codes, lane))
        found = builder.insert_element(found, one, lane)
    return found
