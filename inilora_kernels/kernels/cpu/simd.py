"""The two register-blocked products that every CPU kernel is built from, as LLVM vector code.

numba's own loop vectorizer makes no block of accumulators in registers from simple loops; these intrinsics spell that
block out. Widths follow the machine: LANES float32 in a vector, PANEL columns in a packed panel (VECTORS vectors),
ROWS rows and GROUP ranks a register block, so that the accumulators fill the register file without spilling.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

# What this processor has, in LLVM's names.
FEATURES = frozenset(
    (os.environ.get("NUMBA_CPU_FEATURES") or llvmlite.binding.get_host_cpu_features().flatten()).split(",")
)
if "+avx512f" in FEATURES:
    LANES, VECTORS, ROWS, GROUP = 16, 3, 3, 8
elif "+avx2" in FEATURES:
    LANES, VECTORS, ROWS, GROUP = 8, 3, 3, 4
elif "+neon" in FEATURES:
    LANES, VECTORS, ROWS, GROUP = 4, 6, 6, 4
else:
    LANES, VECTORS, ROWS, GROUP = 4, 3, 3, 4
SMALL_GROUP = 4
# Whether this is one of AMD's processors, which alone have these instructions.
AMD = "+sse4a" in FEATURES
# Without an instruction for it, LLVM would call a library function that does not exist here.
LOADS_FLOAT16 = "+f16c" in FEATURES or "+neon" in FEATURES
# LLVM's name of the instruction that picks sixteen bytes of sixteen; "" where there is none.
BYTE_SHUFFLE = (
    "llvm.x86.ssse3.pshuf.b.128"
    if "+ssse3" in FEATURES
    else "llvm.aarch64.neon.tbl1.v16i8"
    if "+neon" in FEATURES and platform.machine() in ("aarch64", "arm64")
    else ""
)
PANEL = LANES * VECTORS
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def kernel_view(tensor: Tensor) -> NDArray[np.generic]:
    """The same memory in the form that the kernels take: bfloat16 as uint16, float16 as int16."""
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()


_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_INT64 = ir.IntType(64)


def _intrinsic(function: Any) -> Any:
    """numba's decorator; its result is only called from compiled code, without the typing context."""
    return intrinsic(function)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return builder.ptrtoint(context.make_array(array_type)(context, builder, value=array).data, _INT64)


def _vector_type(lanes: int, element: Any = _FLOAT) -> Any:
    return ir.VectorType(element, lanes) if lanes > 1 else element


# Bytes of an entry and its LLVM type, by the dtype that numba sees.
_STORED = {
    types.float32: (4, _FLOAT),
    types.float64: (8, _DOUBLE),
    types.uint16: (2, ir.IntType(16)),
    types.int16: (2, ir.HalfType()),
}
# Bytes.
CACHE_LINE = 64


def _load(builder: Any, address: Any, index: Any, lanes: int, dtype: Any, wide: bool = False) -> Any:
    """`lanes` neighbours at `index` as float32, or all `wide` as float64.

    uint16 holds bfloat16's bits, int16 float16's; float64 is always wide.
    """
    width, element = _STORED[dtype]
    place = builder.add(address, builder.mul(index, _INT64(width)))
    kind = _vector_type(lanes, element)
    value = builder.load(builder.inttoptr(place, kind.as_pointer()), align=width)
    if dtype == types.int16:
        value = builder.fpext(value, _vector_type(lanes))
    if dtype == types.uint16:
        bits = _vector_type(lanes, ir.IntType(32))
        sixteen = ir.Constant(bits, [16] * lanes if lanes > 1 else 16)
        value = builder.bitcast(builder.shl(builder.zext(value, bits), sixteen), _vector_type(lanes))
    if wide and dtype != types.float64:
        value = builder.fpext(value, _vector_type(lanes, _DOUBLE))
    return value


@_intrinsic
def entry(typing: Any, array: Any, index: Any) -> Any:
    """array[index]: float64's as it is, others as float32; uint16 holds bfloat16's bits, int16 float16's.

    Loops over it are vectorized by LLVM.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # By a pointer that LLVM can follow, so that it can prove what does not overlap.
        data = context.make_array(array)(context, builder, value=arguments[0]).data
        value = builder.load(builder.gep(data, [arguments[1]]))
        if array.dtype == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16)), _FLOAT)
        if array.dtype == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), _FLOAT)
        return value

    kind = types.float64 if array.dtype == types.float64 else types.float32
    return kind(array, types.intp), generate


def _fetch(builder: Any, address: Any, index: Any, count: int, dtype: Any) -> None:
    """Have the lines of `count` neighbours at `index` brought into the second cache; they need not be in the array."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    width = _STORED[dtype][0]
    first = builder.add(address, builder.mul(index, _INT64(width)))
    read, second_cache, data = number(0), number(2), number(1)
    for line in range(0, count * width, CACHE_LINE):
        place = builder.inttoptr(builder.add(first, _INT64(line)), byte)
        builder.call(function, [place, read, second_cache, data])


def _store(builder: Any, address: Any, index: Any, value: Any, dtype: Any) -> None:
    width = _STORED[dtype][0]
    place = builder.add(address, builder.mul(index, _INT64(width)))
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=width)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _broadcast(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(_vector_type(lanes, scalar.type), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.IntType(32)(0))
    return _shuffle(builder, first, undefined, [0] * lanes)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = a.type
    # fmuladd, not fma: without a fused unit it becomes two instructions, not a libm call per element.
    name = f"llvm.fmuladd.v{kind.count}f{32 if kind.element == _FLOAT else 64}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sums over the lanes of each of 2ⁿ vectors, side by side in one vector, by a tree of pairwise shuffles."""
    lanes = vectors[0].type.count
    count = len(vectors)
    half = lanes // 2
    while len(vectors) > 1:
        near, far = [], []
        for start in range(0, lanes, 2 * half):
            for source in (0, lanes):
                near += [source + start + lane for lane in range(half)]
                far += [source + start + half + lane for lane in range(half)]
        middle = len(vectors) // 2
        vectors = [
            builder.fadd(_shuffle(builder, a, b, near), _shuffle(builder, a, b, far))
            for a, b in zip(vectors[:middle], vectors[middle:], strict=True)
        ]
        half //= 2
    (total,) = vectors
    while total.type.count > count:
        width = total.type.count
        even, odd = list(range(0, width, 2)), list(range(1, width, 2))
        total = builder.fadd(_shuffle(builder, total, total, even), _shuffle(builder, total, total, odd))
    return total


@_intrinsic
def outer_products(
    typing: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
    x: Any,
    x_start: Any,
    x_step: Any,
    x_stride: Any,
    W: Any,
    W_start: Any,
    W_step: Any,
    count: Any,
    rows: Any,
    lanes: Any,
    vectors: Any,
) -> Any:
    """out[p, :] += Σ_{i<count} x[i, p] · W[i, :] for p < rows and lanes·vectors columns.

    Reads count·lanes·vectors elements of W (row i at W_start + i·W_step), count·rows scalars of x (at x_start +
    i·x_step + p·x_stride); reads and writes rows·lanes·vectors of out (row p at out_start + p·out_stride). The sums
    stay in registers over all i. rows, lanes and vectors are compile-time constants.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (rows, lanes, vectors)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = tuple(t.literal_value for t in (rows, lanes, vectors))
        _add_outer_products(context, builder, (out, x, W), arguments, block)
        return context.get_dummy_value()

    places = [types.int64] * 8
    signature = types.void(out, *places[:2], x, *places[:3], W, *places[:3], rows, lanes, vectors)
    return signature, generate


def _add_outer_products(
    context: Any, builder: Any, kinds: Any, arguments: Any, block: tuple[int, int, int], ahead: Any = None
) -> None:
    """The code of `outer_products`. ahead: how far beyond an entry of W lies one to fetch into the second cache."""
    out, x, W = kinds
    n_rows, n_lanes, n_vectors = block
    out_at, x_at, W_at = (
        _pointer(context, builder, kind, arguments[place]) for kind, place in ((out, 0), (x, 3), (W, 7))
    )
    out_0, out_row, x_0, x_i, x_p, W_0, W_i, n = (arguments[i] for i in (1, 2, 4, 5, 6, 8, 9, 10))
    wide = out.dtype == types.float64
    kind = _vector_type(n_lanes, _DOUBLE if wide else _FLOAT)
    sums = [[cgutils.alloca_once(builder, kind) for _ in range(n_vectors)] for _ in range(n_rows)]

    def place(p: int, v: int) -> Any:
        return builder.add(builder.add(out_0, builder.mul(out_row, _INT64(p))), _INT64(v * n_lanes))

    for p in range(n_rows):
        for v in range(n_vectors):
            builder.store(_load(builder, out_at, place(p, v), n_lanes, out.dtype), sums[p][v])
    with cgutils.for_range(builder, n) as loop:
        row = builder.add(W_0, builder.mul(loop.index, W_i))
        values = [
            _load(builder, W_at, builder.add(row, _INT64(v * n_lanes)), n_lanes, W.dtype, wide)
            for v in range(n_vectors)
        ]
        if ahead is not None:
            _fetch(builder, W_at, builder.add(row, ahead), n_vectors * n_lanes, W.dtype)
        scalar = builder.add(x_0, builder.mul(loop.index, x_i))
        for p in range(n_rows):
            at = builder.add(scalar, builder.mul(x_p, _INT64(p)))
            factor = _broadcast(builder, _load(builder, x_at, at, 1, x.dtype, wide), n_lanes)
            for v in range(n_vectors):
                builder.store(_fma(builder, factor, values[v], builder.load(sums[p][v])), sums[p][v])
    for p in range(n_rows):
        for v in range(n_vectors):
            _store(builder, out_at, place(p, v), builder.load(sums[p][v]), out.dtype)


@_intrinsic
def inner_products(
    typing: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
    W: Any,
    W_start: Any,
    W_panel: Any,
    A: Any,
    A_start: Any,
    A_panel: Any,
    panels: Any,
    rows: Any,
    group: Any,
) -> Any:
    """out[i, p] += Σ_j W[i, j] · A[p, j] for i < rows, p < group, over `panels` panels of PANEL columns.

    Within a panel the rows of W, and those of A, are PANEL elements apart; panel n begins at start + n·panel. Reads
    rows·PANEL elements of W and group·PANEL of A a panel; reads and writes rows·group of out. rows and group are
    compile-time constants.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (rows, group)):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n_rows, n_group = rows.literal_value, group.literal_value
        out_at, W_at, A_at = (
            _pointer(context, builder, kind, arguments[place]) for kind, place in ((out, 0), (W, 3), (A, 6))
        )
        out_0, out_row, W_0, W_n, A_0, A_n, n = (arguments[i] for i in (1, 2, 4, 5, 7, 8, 9))
        kind = _vector_type(LANES)
        sums = [[cgutils.alloca_once(builder, kind) for _ in range(n_group)] for _ in range(n_rows)]
        zero = ir.Constant(kind, [0.0] * LANES)
        for i in range(n_rows):
            for p in range(n_group):
                builder.store(zero, sums[i][p])
        with cgutils.for_range(builder, n) as loop:
            W_here = builder.add(W_0, builder.mul(loop.index, W_n))
            A_here = builder.add(A_0, builder.mul(loop.index, A_n))
            for v in range(VECTORS):
                values = [
                    _load(builder, W_at, builder.add(W_here, _INT64(i * PANEL + v * LANES)), LANES, W.dtype)
                    for i in range(n_rows)
                ]
                for p in range(n_group):
                    at = builder.add(A_here, _INT64(p * PANEL + v * LANES))
                    other = _load(builder, A_at, at, LANES, types.float32)
                    for i in range(n_rows):
                        builder.store(_fma(builder, values[i], other, builder.load(sums[i][p])), sums[i][p])
        for i in range(n_rows):
            total = _sum_lanes(builder, [builder.load(sums[i][p]) for p in range(n_group)])
            at = builder.add(out_0, builder.mul(out_row, _INT64(i)))
            before = _load(builder, out_at, at, n_group, types.float32)
            _store(builder, out_at, at, builder.fadd(before, total), types.float32)
        return context.get_dummy_value()

    place = types.int64
    signature = types.void(out, place, place, W, place, place, A, place, place, place, rows, group)
    return signature, generate


@_intrinsic
def atomic_add(typing: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to array[index] (int64) atomically, sequentially consistent; returns the value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, array, arguments[0])
        place = builder.add(address, builder.mul(arguments[1], _INT64(8)))
        pointer = builder.inttoptr(place, _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@_intrinsic
def compare_and_swap(typing: Any, array: Any, index: Any, expected: Any, value: Any) -> Any:
    """Set array[index] (int64) if it is as expected, atomically, sequentially consistent; returns whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, array, arguments[0])
        place = builder.add(address, builder.mul(arguments[1], _INT64(8)))
        pointer = builder.inttoptr(place, _INT64.as_pointer())
        pair = builder.cmpxchg(pointer, arguments[2], arguments[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), generate


@_intrinsic
def spin_pause(typing: Any) -> Any:
    """Tell the core that this thread is only waiting (x86's PAUSE); does nothing elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if "x86" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), generate


give_way = types.ExternalFunction("sched_yield", types.int32()) if os.name == "posix" else spin_pause
