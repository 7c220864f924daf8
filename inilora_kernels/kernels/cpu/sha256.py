"""SHA-256 of several messages at once, one in each lane of a vector.

A message is a chain of additions, each of which waits for the last: without instructions of its own for it a processor
takes 2.7 ns a byte on it, however wide its vectors are. Eight messages take no longer than one.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor

from .jit import njit
from .simd import _INT64, FEATURES, _intrinsic, _pointer, _shuffle

# Messages at a time. Sixteen, with AVX-512, are a fifth faster a byte, but only where there are so many.
MOST = 8
# Without AVX-512 a rotation is three instructions, which no processor makes up for that has some for SHA-256.
_MAY_PAY = "+avx512vl" in FEATURES or ("+avx2" in FEATURES and "+sha" not in FEATURES)
# Bytes.
BLOCK = 64
# Loading the kernel takes 16 ms, once a process: for fewer bytes it is not asked for.
_WORTH_LOADING = 1 << 20
# How much faster it has to be: what is hashed one by one can be waited for beside other work.
_CLEARLY = 1.25
# Bytes of a message that both ways are timed on.
_TIMED = 1 << 16

_PRIMES = [n for n in range(2, 312) if all(n % divisor for divisor in range(2, n))]
_LANES = ir.VectorType(ir.IntType(32), MOST)

Key = TypeVar("Key")


def _fraction(number: int, root: int) -> int:
    """The first 32 bits of the fraction of a root, from which SHA-256 has its constants (FIPS 180-4, 4.2.2, 5.3.3)."""
    return int(number ** (1 / root) * 2.0**32) % 2**32


_START = np.array([_fraction(prime, 2) for prime in _PRIMES[:8]], dtype=np.uint32)
_ROUNDS = [_fraction(prime, 3) for prime in _PRIMES]


def pays(messages: int, size: int) -> bool:
    """Whether a thread's `digests` of so many messages at a time are faster than hashlib, one by one.

    size: of all that the thread has to hash, in bytes.

    >>> pays(1, 1 << 30)
    False
    """
    if messages < 2 or not _MAY_PAY or not (_advance.overloads or size >= _WORTH_LOADING):
        return False
    together, alone = _seconds()
    return _CLEARLY * together < min(messages, MOST) * alone


def digests(messages: Iterator[tuple[Key, Iterable[Tensor]]], count: int) -> Generator[tuple[Key, str], None, None]:
    """The sha256 (hex) of each message, `count` of them at a time, as they end. count: at most MOST.

    messages: each with a key, and its bytes in order, in parts: contiguous tensors on the CPU, all but the last one of
        a multiple of 64 bytes. A part is done with when the next one is asked for. Messages are taken one by one, so
        that threads can share the iterator.

    >>> zeros = [("a", [torch.zeros(16), torch.zeros(3)]), ("b", [torch.zeros(0)])]
    >>> [(key, sha256[:8]) for key, sha256 in digests(iter(zeros), 2)]
    [('b', 'e3b0c442'), ('a', 'f2c0d545')]
    """
    state = np.zeros((len(_START), MOST), np.uint32)
    places, left = np.zeros(MOST, np.int64), [0] * count
    begun: dict[int, tuple[Key, Generator[NDArray[np.uint8], None, None]]] = {}
    # What the places point into.
    held: dict[int, NDArray[np.uint8]] = {}
    try:
        while True:
            for lane in range(count):
                while not left[lane]:
                    if lane in begun:
                        key, parts = begun[lane]
                        if (part := next(parts, None)) is not None:
                            held[lane], places[lane], left[lane] = part, part.ctypes.data, len(part) // BLOCK
                            break
                        del begun[lane]
                        yield key, state[:, lane].astype(">u4").tobytes().hex()
                    if (message := next(messages, None)) is None:
                        break
                    begun[lane] = message[0], _in_whole_blocks(message[1])
                    state[:, lane] = _START
            if not begun:
                return
            blocks = min(left[lane] for lane in begun)
            # Lanes without a message read another's.
            idle = [lane for lane in range(MOST) if lane not in begun]
            places[idle] = places[next(iter(begun))]
            _advance(state, places, blocks)
            places += BLOCK * blocks
            for lane in begun:
                left[lane] -= blocks
    finally:
        for _, parts in begun.values():
            parts.close()


def _in_whole_blocks(parts: Iterable[Tensor]) -> Generator[NDArray[np.uint8], None, None]:
    """A message's bytes, and its padding (FIPS 180-4, 5.1.1): a one, zeros, and its length in bits."""
    size, rest = 0, b""
    try:
        for part in parts:
            assert not rest, "a part before the last one has no whole number of blocks"
            data = part.reshape(-1).view(torch.uint8).numpy()
            size += len(data)
            whole = len(data) // BLOCK * BLOCK
            if whole:
                yield data[:whole]
            rest = data[whole:].tobytes()
        zeros = bytes(-(len(rest) + 9) % BLOCK)
        yield np.frombuffer(rest + b"\x80" + zeros + (8 * size).to_bytes(8, "big"), np.uint8)
    finally:
        # Whoever holds an error would hold open what is read.
        if isinstance(parts, Generator):
            parts.close()


@functools.cache
def _seconds() -> tuple[float, float]:
    """What a message of some length takes: a vector of them together, and one by hashlib.

    Infinite for the first where the two do not agree: a wrong name would be found long after the run.
    """
    messages = [(torch.arange(_TIMED) % (256 - lane)).to(torch.uint8) for lane in range(MOST)]

    def together() -> dict[int, str]:
        return dict(digests(((lane, [message]) for lane, message in enumerate(messages)), MOST))

    def alone(lane: int = 0) -> str:
        return hashlib.sha256(messages[lane].numpy().data).hexdigest()

    if together() != {lane: alone(lane) for lane in range(MOST)}:  # and loads the kernel
        return math.inf, 1.0
    taken: dict[Any, list[float]] = {together: [], alone: []}
    for _ in range(3):
        for way, times in taken.items():
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return min(taken[together]), min(taken[alone])


@njit(cache=True, nogil=True)
def _advance(state: Any, places: Any, blocks: int) -> None:
    """Take a message's next blocks of 64 bytes into its column of the state (8×MOST), for one at each of the places.

    Reads 64·blocks bytes at each of MOST places, and reads and writes the state once a block.
    """
    for block in range(blocks):
        _compress(state, places, block)


@_intrinsic
def _compress(typing: Any, state: Any, places: Any, block: Any) -> Any:
    """SHA-256's compression (FIPS 180-4, 6.2.2) of a block of 64 bytes, that many blocks after each of the places."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        states = _pointer(context, builder, state, arguments[0])
        columns = builder.inttoptr(states, _LANES.as_pointer())
        rows = [builder.gep(columns, [_INT64(row)]) for row in range(8)]
        before = [builder.load(row, align=4) for row in rows]
        first = builder.inttoptr(_pointer(context, builder, places, arguments[1]), _INT64.as_pointer())
        offset = builder.mul(arguments[2], _INT64(BLOCK))
        addresses = [
            builder.add(builder.load(builder.gep(first, [_INT64(lane)])), offset) for lane in range(_LANES.count)
        ]
        after = _rounds(builder, before, _words(builder, addresses))
        for row, old, new in zip(rows, before, after, strict=True):
            builder.store(builder.add(old, new), row, align=4)
        return context.get_dummy_value()

    return types.void(state, places, types.int64), generate


def _words(builder: Any, addresses: list[Any]) -> list[Any]:
    """The sixteen words of each address's block, most significant byte first: a vector for each word."""
    width = _LANES.count
    words = []
    for start in range(0, BLOCK, 4 * width):
        vectors = [
            builder.load(builder.inttoptr(builder.add(address, _INT64(start)), _LANES.as_pointer()), align=1)
            for address in addresses
        ]
        # A transposition: of each two vectors that are `apart`, blocks of so many lanes change places.
        apart = 1
        while apart < width:
            near = [lane if not lane & apart else width + (lane ^ apart) for lane in range(width)]
            far = [lane | apart if not lane & apart else width + lane for lane in range(width)]
            for i in range(width):
                if not i & apart:
                    a, b = vectors[i], vectors[i | apart]
                    vectors[i], vectors[i | apart] = _shuffle(builder, a, b, near), _shuffle(builder, a, b, far)
            apart *= 2
        words += vectors
    return [_call(builder, "bswap", word) for word in words]


def _rounds(builder: Any, before: list[Any], words: list[Any]) -> list[Any]:
    """The eight working variables after all rounds. words: the first sixteen of the schedule; the others follow."""

    def constant(number: int) -> Any:
        return ir.Constant(_LANES, [number] * _LANES.count)

    def rotated(x: Any, *by: int) -> Any:
        """The exclusive or of x rotated right by each of these numbers of bits."""
        return functools.reduce(builder.xor, [_call(builder, "fshr", x, x, constant(bits)) for bits in by])

    def total(*terms: Any) -> Any:
        return functools.reduce(builder.add, terms)

    schedule = list(words)
    a, b, c, d, e, f, g, h = before
    for t, number in enumerate(_ROUNDS):
        if t >= len(words):
            early, late = schedule[t - 15], schedule[t - 2]
            small_0 = builder.xor(rotated(early, 7, 18), builder.lshr(early, constant(3)))
            small_1 = builder.xor(rotated(late, 17, 19), builder.lshr(late, constant(10)))
            schedule.append(total(schedule[t - 16], small_0, schedule[t - 7], small_1))
        choice = builder.xor(g, builder.and_(e, builder.xor(f, g)))
        majority = builder.or_(builder.and_(a, b), builder.and_(c, builder.or_(a, b)))
        new = total(h, rotated(e, 6, 11, 25), choice, builder.add(schedule[t], constant(number)))
        a, b, c, d, e, f, g, h = total(new, rotated(a, 2, 13, 22), majority), a, b, c, builder.add(d, new), e, f, g
    return [a, b, c, d, e, f, g, h]


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """LLVM's own function of this name on vectors of lanes."""
    kind = ir.FunctionType(_LANES, [_LANES] * len(operands))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{_LANES.count}i32")
    return builder.call(function, operands)
