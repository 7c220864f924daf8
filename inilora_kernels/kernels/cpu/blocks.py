"""Blocks of stored weights decoded as LLVM vectors, sixteen values each.

They are too short for loops: LLVM would ask before each block whether it overlaps its result. Arrays are flat, and
results are rounded as by `elements.put`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .elements import place, round_to, transposed, widened
from .simd import BYTE_SHUFFLE

_BYTE = ir.IntType(8)
_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_FLOAT = ir.FloatType()
# Values in a vector.
SIXTEEN = 16
# E4M3's subnormal numbers, then 1 to 1 7/8 with the exponent that the code 0 stands for.
E4M3_SIGNIFICANDS = np.array([*(m * 2.0**-9 for m in range(8)), *((8 + m) * 2.0**-10 for m in range(8))], np.float32)


def _intrinsic(function: Any) -> Any:
    """numba's decorator; its result is only called from compiled code, without the typing context."""
    return intrinsic(function)


@_intrinsic
def put_columns(
    typing: Any,
    words: Any,
    at: Any,
    stride: Any,
    groups: Any,
    j: Any,
    offset: Any,
    scale: Any,
    result: Any,
    to: Any,
    step: Any,
) -> Any:
    """result[to + i · step + n] = (code − offset[16 g + i]) · scale[16 g + i] for sixteen rows i and columns n, whose
    groups are g = groups[j + n].

    Column n's codes are the 4 bits of words[at + n // 8 · stride + i] (int32) from the bit 4 (n % 8) on: sixteen rows
    of a column are neighbours, and what they become is transposed.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words_, at_, stride_, groups_, j_, offset_, scale_, result_, to_, step_ = arguments
        load = _loader(context, builder)
        eights = [load(words, words_, at_, _INT32), load(words, words_, builder.add(at_, stride_), _INT32)]
        columns = []
        for n in range(SIXTEEN):
            bits = builder.lshr(eights[n // 8], _same(_INT32, 4 * (n % 8)))
            codes = builder.sitofp(builder.and_(bits, _same(_INT32, 15)), _vector(_FLOAT))
            group = builder.load(place(context, builder, groups, groups_, builder.add(j_, _intp(n))))
            first = builder.mul(group, _intp(SIXTEEN))
            less = builder.fsub(codes, load(offset, offset_, first, _FLOAT))
            value = round_to(builder, result.dtype, builder.fmul(less, load(scale, scale_, first, _FLOAT)))
            columns.append(builder.bitcast(value, _vector(ir.IntType(result.dtype.bitwidth))))
        for i, row in enumerate(transposed(builder, columns)):
            _store(context, builder, result, result_, builder.add(to_, builder.mul(step_, _intp(i))), row)
        return context.get_dummy_value()

    index = types.intp
    return types.void(words, index, index, groups, index, offset, scale, result, index, index), generate


@_intrinsic
def put_e4m3(typing: Any, flat: Any, at: Any, planes: Any, result: Any, to: Any) -> Any:
    """result[to + n] = e4m3(flat[at + n]) · s for sixteen values, in bfloat16's bits; s and all products are normal.

    planes: by `put_planes`, of E4M3_SIGNIFICANDS · s. A product's rounding depends on the three bits of the code's
    significand alone: its exponent is added to that of the rounded significand.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flat_, at_, planes_, result_, to_ = arguments
        load = _loader(context, builder)
        codes = load(flat, flat_, at_, _BYTE)
        exponent = builder.and_(codes, _same(_BYTE, 0x78))
        normal = builder.select(
            builder.icmp_unsigned("!=", exponent, _same(_BYTE, 0)), _same(_BYTE, 8), _same(_BYTE, 0)
        )
        which = builder.or_(builder.and_(codes, _same(_BYTE, 7)), normal)
        low, high = (
            _shuffle_bytes(builder, load(planes, planes_, _intp(SIXTEEN * byte), _BYTE), which) for byte in range(2)
        )
        significand = builder.bitcast(_interleave(builder, low, high), _vector(_INT16))
        wide = builder.zext(codes, _vector(_INT16))
        shifted = builder.shl(builder.and_(wide, _same(_INT16, 0x78)), _same(_INT16, 4))
        sign = builder.shl(builder.and_(wide, _same(_INT16, 0x80)), _same(_INT16, 8))
        value = builder.xor(builder.add(significand, shifted), sign)
        is_nan = builder.icmp_unsigned("==", builder.and_(wide, _same(_INT16, 0x7F)), _same(_INT16, 0x7F))
        _store(context, builder, result, result_, to_, builder.select(is_nan, _same(_INT16, 0x7FC0), value))
        return context.get_dummy_value()

    return types.void(flat, types.intp, planes, result, types.intp), generate


@_intrinsic
def move(typing: Any, source: Any, first: Any, result: Any, to: Any) -> Any:
    """result[to : to + 16] = source[first : first + 16], of one dtype."""
    element = ir.IntType(source.dtype.bitwidth)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_, first_, result_, to_ = arguments
        _store(context, builder, result, result_, to_, _loader(context, builder)(source, source_, first_, element))
        return context.get_dummy_value()

    return types.void(source, types.intp, result, types.intp), generate


@_intrinsic
def put_words(typing: Any, words: Any, at: Any, shift: Any, offset: Any, scale: Any, result: Any, to: Any) -> Any:
    """result[to + n] = (code − offset) · scale for sixteen codes: the 4 bits of words[at + n] (int32) from the bit
    `shift` on.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words_, at_, shift_, offset_, scale_, result_, to_ = arguments
        bits = builder.lshr(_loader(context, builder)(words, words_, at_, _INT32), _splat(builder, shift_, SIXTEEN))
        codes = builder.sitofp(builder.and_(bits, _same(_INT32, 15)), _vector(_FLOAT))
        values = builder.fmul(builder.fsub(codes, _splat(builder, offset_, SIXTEEN)), _splat(builder, scale_, SIXTEEN))
        _store(context, builder, result, result_, to_, round_to(builder, result.dtype, values))
        return context.get_dummy_value()

    number = types.float32
    return types.void(words, types.intp, types.int32, number, number, result, types.intp), generate


@_intrinsic
def put_planes(typing: Any, values: Any, factor: Any, like: Any, planes: Any) -> Any:
    """Sixteen values (float32) times a factor, rounded to the dtype of `like`, as `look_up` takes them.

    planes: uint8; the lowest byte of each of the sixteen, then the next byte of each, to the highest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_, factor_, _, planes_ = arguments
        sixteen = _loader(context, builder)(values, values_, _intp(0), _FLOAT)
        product = builder.fmul(sixteen, _splat(builder, factor_, SIXTEEN))
        _store_planes(context, builder, planes, planes_, round_to(builder, like.dtype, product))
        return context.get_dummy_value()

    return types.void(values, types.float32, like, planes), generate


@_intrinsic
def put_integers(typing: Any, offset: Any, scale: Any, like: Any, planes: Any) -> Any:
    """(n − offset) · scale for n = 0 to 15, as `put_planes` puts its values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        offset_, scale_, _, planes_ = arguments
        less = builder.fsub(_counting(), _splat(builder, offset_, SIXTEEN))
        values = builder.fmul(less, _splat(builder, scale_, SIXTEEN))
        _store_planes(context, builder, planes, planes_, round_to(builder, like.dtype, values))
        return context.get_dummy_value()

    return types.void(types.float32, types.float32, like, planes), generate


@_intrinsic
def put_affine(typing: Any, scale: Any, bias: Any, like: Any, planes: Any) -> Any:
    """n · scale, rounded to the dtype of `like`, + bias for n = 0 to 15, as `put_planes` puts its values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scale_, bias_, _, planes_ = arguments
        product = round_to(builder, like.dtype, builder.fmul(_counting(), _splat(builder, scale_, SIXTEEN)))
        values = builder.fadd(widened(builder, like.dtype, product), _splat(builder, bias_, SIXTEEN))
        _store_planes(context, builder, planes, planes_, round_to(builder, like.dtype, values))
        return context.get_dummy_value()

    return types.void(types.float32, types.float32, like, planes), generate


def _store_planes(context: Any, builder: Any, array_type: Any, array: Any, values: Any) -> None:
    size = 4 if values.type.element == _FLOAT else values.type.element.width // 8
    element = ir.IntType(8 * size)
    bits = builder.bitcast(values, _vector(element))
    for byte in range(size):
        plane = builder.trunc(builder.lshr(bits, _same(element, 8 * byte)), _vector(_BYTE))
        _store(context, builder, array_type, array, _intp(SIXTEEN * byte), plane)


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


def _counting() -> Any:
    return ir.Constant(_vector(_FLOAT), [float(n) for n in range(SIXTEEN)])


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
