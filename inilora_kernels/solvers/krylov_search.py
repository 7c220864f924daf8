"""The search for the leading Ritz pairs of one W: a block Krylov space that proves that it missed none.

Where it cannot, since values are too close, a second space bounds what it missed.

Where W is so small that calls would take longer than sums, the whole search is one compiled call
(kernels/cpu/search.py). Otherwise, and where that one comes upon something rare, it goes step by step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.streaming import GramReader, gram_multiplier
from .certificate import expected_factor, least_of_pairs
from .goal import Goal, next_count, next_size
from .krylov_space import LIMITS, KrylovSpace
from .ritz import RitzPairs

# A pass with four columns is about as long in arithmetic as in memory on two cores with AVX-512. More columns converge
# more slowly, but prove more: by four, what float32 rounds away comes near to the count's ε from rank 112 or so on.
_NARROW, _WIDE, _WIDE_RANK = 4, 8, 112
# Vectors that a real spectrum takes until it is proven: so many times the rank, plus a constant, whichever pair gives
# fewer, by either block; and by how much less, as they come to be a large share of W's smaller side, since its spectrum
# has an end. They decide when to look, since a look costs an eigenvalue problem of the space's size: as much as several
# passes over a small W, so that a first look comes later there, by so many vectors over the square of its smaller side.
_VECTORS = {_NARROW: ((4.0, 42), (3.3, 68)), _WIDE: ((3.1, 112),)}
_LESS = {_NARROW: 0.65, _WIDE: 0.33}
_LATER = 2.2e6
# And never fewer than so many times the rank, and two blocks.
_LEAST_A_RANK = 2.9
# The space may grow to this many times that before the search is given up.
_MOST_GROWTH = 10
# The space has converged when its promise is below this share of what the certificate must reach.
PROMISED = 0.5
# A second space whose Ritz values come this close to θ_r has found what the first one missed.
_MISSED = 0.985
# It has found enough where λ_max outside is below so many times θ_r, or what was expected: the first that settles all.
_BOUNDS = np.array([0.98, 0.96, 0.93, 0.9])
# Passes of the second space before it may be judged.
_JUDGED_AFTER = 4
# Passes of a second space, once all is proven, in which a proof by few vectors may come.
_MORE_FOR_FEW = 3
# As many as are worth having for a first space that need not grow on.
_EXPECTED_PASSES = 14
_MOST_CERTIFYING = 64
# A search may take so many bytes an entry of W: 1.25 times W in float32.
_MOST_BYTES = 5

# A call for what a search's random blocks are drawn from: `digest` of W.
Key = Callable[[], bytes]
# For `digest`: as many as it likes.
ALL_THREADS = blake3.AUTO


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search found: Ritz pairs, the basis Q of their space (m×n, rows), and how to prove what they promise.

    kept: so many leading Ritz vectors, outside of which λ_max is at most `outside`, infinite where nothing is known.
    settled: whether that proves the goal, if the last pass finds what was promised. passes: over W. vectors: that W was
    multiplied with, on both sides. small: W in float32, where it is so small that the search was one compiled call.
    """

    pairs: RitzPairs
    basis: Tensor
    kept: int
    outside: float
    settled: bool
    passes: int
    vectors: int
    small: Tensor | None = None


def search(W: Tensor, goal: Goal, dtype: torch.dtype, key: Key, threads: int) -> Searched | None:
    """The Ritz pairs of W (d×k, d ≥ k) that reach the goal, or all that were worth looking for.

    key: W's hash, which decides the random blocks. None if products in this dtype turn out to be too coarse.
    """
    if dtype == torch.float32:
        from ..kernels.cpu.gram import for_one_thread, takes

        # A copy of what is so small takes less time than compiling the search for another dtype.
        if takes(W, dtype) and for_one_thread(W, _block(goal.rank)):
            left, found = _in_one_call(W.float(), goal, key)
            if not left:
                return found
    multiply = gram_multiplier(_spread(W, goal.rank, dtype, threads), dtype, threads)
    return _Search(W, goal, multiply, dtype, key).run()


def _spread(W: Tensor, rank: int, dtype: torch.dtype, threads: int) -> Tensor:
    """W, or a copy that passes take a tenth less time over, where they do and there is room for it."""
    from ..kernels.cpu.gram import SPREADS, crowded, spread, takes

    if not SPREADS or not takes(W, dtype) or not crowded(W):
        return W
    size, vectors = W.shape[1], expected_vectors(rank, W.shape[1])
    # At its peak a search takes twice its basis in float32 and QMQᵀ in float64, in two forms.
    beside = 2 * (4 * size * vectors + 16 * vectors**2)
    room = W.numel() * W.element_size() + beside <= _MOST_BYTES * W.numel()
    return spread(W, threads) if room else W


def expected_vectors(rank: int, size: int) -> float:
    """How many vectors a search is expected to take for W of this smaller side.

    >>> round(expected_vectors(8, 4096)), round(expected_vectors(128, 4096)), round(expected_vectors(128, 768))
    (74, 506, 447)
    """
    block = _block(rank)
    vectors = min(a_rank * rank + more for a_rank, more in _VECTORS[block]) + _LATER / size**2
    vectors = min(vectors, 1.5 * size)
    return max(_LEAST_A_RANK * rank + 2 * block, vectors / (1 + _LESS[block] * (vectors / size) ** 2))


@functools.cache
def _expected_factors(size: int, block: int) -> NDArray[np.float64]:
    """`expected_factor` after 1, 2, … passes of the second space."""
    return np.array([expected_factor(size, block, 1 + passes) for passes in range(_MOST_CERTIFYING)])


def _block(rank: int) -> int:
    return _NARROW if rank < _WIDE_RANK else _WIDE


def least_counting(block: int, rank: int) -> float:
    """ε of the count, for as many Ritz vectors as it may be taken for, by a start of so many columns."""
    from ..kernels.cpu.judgement import FEW_BEYOND

    return least_of_pairs(block, rank + FEW_BEYOND)


def _most_vectors(size: int, rank: int) -> int:
    return min(size - 2 * _block(rank), int(_MOST_GROWTH * expected_vectors(rank, size)))


def gaussian(rows: int, size: int, stream: torch.Generator) -> Tensor:
    return torch.randn(rows, size, generator=stream, dtype=torch.float32)


def digest(W: Tensor, threads: int = 1) -> bytes:
    """The blake3 of W's entries, row by row: it decides the random blocks.

    Nobody can choose a W against blocks that a cryptographic hash of it decides, and the search waits for it: vector
    code takes 2 to 7 GB/s on one thread, sha256 0.4 where the processor has no instructions for that, else 1.6.

    >>> digest(torch.eye(2)) == digest(torch.eye(4)[::2, ::2]), digest(torch.eye(2)) == digest(-torch.eye(2))
    (True, False)
    """
    return blake3(W.detach().cpu().contiguous().view(torch.uint8).numpy().data, max_threads=threads).digest()


def trusted_stream(key: bytes) -> torch.Generator:
    """For a search's draws: decided by W's hash."""
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


def _in_one_call(W: Tensor, goal: Goal, key: Key) -> tuple[bool, Searched | None]:
    """The search by one compiled call; and whether it left it to the search step by step. W: float32."""
    from ..kernels.cpu import search as compiled
    from ..kernels.cpu.gram import FusedGramReaders

    block, size = _block(goal.rank), W.shape[1]
    ended, basis, parts, kept, outside, passes = compiled.search(
        *FusedGramReaders(W, threads=1).of(block).compiled,
        gaussian(block, size, trusted_stream(key())).numpy(),
        goal.each_rank,
        goal.numbers,
        (expected_vectors(goal.rank, size), _most_vectors(size, goal.rank)),
        LIMITS,
        least_counting(block, goal.rank),
        PROMISED,
        float(_expected_factors(size, _NARROW)[_EXPECTED_PASSES - 1]),
    )
    if ended in (compiled.LEFT, compiled.COARSE):
        return ended == compiled.LEFT, None
    searched = RitzPairs(*parts), torch.from_numpy(basis), kept or goal.rank, outside, kept > 0
    return False, Searched(*searched, passes, len(basis), W)


class _Search:
    """The search step by step, for any device and dtype."""

    def __init__(self, W: Tensor, goal: Goal, multiply: GramReader, dtype: torch.dtype, key: Key) -> None:
        self._device, self._size, self._dtype, self._multiply = W.device, W.shape[1], dtype, multiply
        self._goal = goal
        self._stream = trusted_stream(key())
        self._space = KrylovSpace(multiply, self._random(_block(goal.rank)), self._stream)
        self._least = least_counting(_block(goal.rank), goal.rank)
        # An upper bound on what lies outside of the space, once a second space has given one.
        self._missed = math.inf
        self._most = _most_vectors(self._size, goal.rank)
        self._spent = 0

    def run(self) -> Searched | None:
        """What was found; None if the dtype turns out to be too coarse."""
        while True:
            pairs, kept, outside = self._converge()
            if pairs is None:
                return None
            if kept > 0:
                return self._found(pairs, kept, outside, settled=True)
            other = self._look_outside(pairs)
            settled = self._goal.settled(pairs, self._missed)[0]
            if other is not None:
                self._space.take(other)
                self._missed = math.inf
                del pairs, other
            elif settled or not self._growing():
                kept = self._goal.kept(pairs, self._missed)
                return self._found(pairs, kept, self._goal.outside(pairs, kept, self._missed), settled)

    def _found(self, pairs: RitzPairs, kept: int, outside: float, settled: bool) -> Searched:
        passes, vectors = self._space.passes + self._spent // _NARROW, self._space.size + self._spent
        return Searched(pairs, self._space.Q, kept, outside, settled, passes, vectors)

    def _random(self, rows: int) -> Tensor:
        return gaussian(rows, self._size, self._stream).to(self._device, self._dtype)

    def _growing(self) -> bool:
        return self._space.room and self._space.size < self._most

    def _expected_outside(self, pairs: RitzPairs) -> float:
        return self._goal.expected_outside(pairs, float(_expected_factors(self._size, _NARROW)[_EXPECTED_PASSES - 1]))

    def _converge(self) -> tuple[RitzPairs | None, int, float]:
        """Grow the space until the count proves the goal, or it promises enough, or is full.

        Returns its Ritz pairs, None if the dtype is too coarse; of how many the count proves the goal, 0 if it does
        not; and c'.
        """
        target = max(self._space.size + 1, expected_vectors(self._goal.rank, self._size))
        before, then, bound_then = 0, math.inf, math.inf
        while True:
            self._space.grow(min(target, self._most), passes=self._size)
            pairs = self._space.ritz()
            if self._goal.too_coarse(pairs):
                return None, 0, math.inf
            kept, outside, bound = self._goal.counted(pairs, self._least)
            if kept > 0:
                return pairs, kept, outside
            missed = self._missed
            if missed == math.inf:
                missed = self._expected_outside(pairs)
            promised, size = self._goal.promised(pairs, missed, enough=PROMISED), self._space.size
            if promised > PROMISED:
                target = next_size(size, promised, before, then, PROMISED)
            else:
                target = next_count(size, self._space.block, bound, before, bound_then)
            if target == 0 or not self._growing():
                return pairs, 0, math.inf
            before, then, bound_then = size, promised, bound
            # They hold as much as QMQᵀ twice, beside which the next ones would be made.
            del pairs

    def _look_outside(self, pairs: RitzPairs) -> KrylovSpace | None:
        """Lower the bound on what lies outside until all is settled. Returns what was missed, if anything."""
        width = min(_NARROW, self._size - self._space.size)
        factors = _expected_factors(self._size, width)
        expected = self._expected_outside(pairs)
        stops = self._goal.stops_outside(pairs, factors, expected, _BOUNDS, _JUDGED_AFTER, _MISSED)
        other = KrylovSpace(self._multiply, self._random(width), self._stream, fixed=self._space.Q)
        other.grow(math.inf, passes=_MOST_CERTIFYING, stops=stops)
        if other.passes == 0:
            return None
        highest = float(pairs.theta[self._goal.rank - 1])
        last = _MOST_CERTIFYING
        while True:
            bound, largest = other.bound_outside()
            self._missed = min(self._missed, bound + 2 * self._goal.rounding(pairs))
            proven, by_few = self._goal.settled(pairs, self._missed)
            if proven:
                last = min(last, other.passes + _MORE_FOR_FEW)
            if by_few or other.passes >= last or not other.room or not (proven or largest < _MISSED * highest):
                break
            other.grow(math.inf, passes=1)
        if largest >= _MISSED * highest and not proven:
            return other if self._growing() else None
        self._spent += other.size
        return None
