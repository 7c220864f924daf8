"""The search for the leading Ritz pairs of one W: a block Krylov space, and a second one that bounds what it missed.

Where W is so small that calls would take longer than sums, the whole search is one compiled call
(kernels/cpu/search.py). Otherwise, and where that one comes upon something rare, it goes step by step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.streaming import GramReader, gram_multiplier
from ..kernels.threads import beside
from .certificate import expected_factor, least_part
from .goal import Goal, next_size
from .krylov_space import LIMITS, KrylovSpace
from .ritz import RitzPairs

# A pass with four columns is about as long in arithmetic as in memory on two cores with AVX-512; more columns multiply
# faster and converge more slowly, which pays where the space is large anyway.
_NARROW, _WIDE, _WIDE_RANK = 4, 8, 96
# Vectors that a real spectrum takes to converge: so many times the rank, plus a constant, by either block; and the
# share of them, by the rank's share of a matrix's smaller side, whose spectrum has an end: it falls from 1 to its
# least. They decide when to look, since a look costs an eigenvalue problem of the space's size.
_VECTORS = {_NARROW: (3.7, 32), _WIDE: (4.1, 40)}
_WHOLE_SHARE, _SHARE_LESS, _LEAST_SHARE = 1.06, 1.7, 0.6
# The space may grow to this many times that before the search is given up.
_MOST_GROWTH = 10
# The space has converged when its promise is below this share of what the certificate must reach.
PROMISED = 0.5
# A second space whose Ritz values come this close to θ_r has found what the first one missed.
MISSED = 0.985
# It has found enough where λ_max outside is below so many times θ_r, or what was expected: the first that settles all.
_BOUNDS = np.array([0.98, 0.96, 0.93, 0.9])
# Passes of the second space before it may be judged.
_JUDGED_AFTER = 4
# Passes of the second space, once all is proven, in which a proof by few vectors may come.
_MORE_FOR_FEW = 3
# A pass of the second space takes as long on a thread as so many entries of W, and twice those of both bases, take of
# the cube of the Ritz pairs' number. As many passes as that, at least and at most, are made beside the Ritz pairs.
_RITZ_OVER_PASS, _LEAST_BESIDE, _MOST_BESIDE = 2.5, 2, 10
# As many as are worth having for a first space that need not grow on.
_EXPECTED_PASSES = 14
_MOST_CERTIFYING = 64
# A search may take so many bytes an entry of W: 1.25 times W in float32.
_MOST_BYTES = 5
# As kernels/cpu/search.py takes them.
_AIMS = PROMISED, _EXPECTED_PASSES, _JUDGED_AFTER, MISSED, _MORE_FOR_FEW

# The sha256 of W's bytes.
Digest = Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search found: Ritz pairs, the basis Q of their space (m×n, rows), and the bound on λ_max outside of it.

    passes: over W. vectors: that W was multiplied with, on both sides. small: W in float32, where it is so small that
        the search was one compiled call.
    """

    pairs: RitzPairs
    basis: Tensor
    missed: float
    passes: int
    vectors: int
    small: Tensor | None = None


def search(W: Tensor, goal: Goal, dtype: torch.dtype, key: Digest, threads: int) -> Searched | None:
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
    return _Search(W, goal, multiply, dtype, key, threads).run()


def _spread(W: Tensor, rank: int, dtype: torch.dtype, threads: int) -> Tensor:
    """W, or a copy that passes take a tenth less time over, where there is room for it beside what the search takes."""
    from ..kernels.cpu.gram import crowded, spread, takes

    if not takes(W, dtype) or not crowded(W):
        return W
    size, vectors = W.shape[1], expected_vectors(rank, W.shape[1])
    # At its peak a search takes twice its basis in float32 and QMQᵀ in float64, in two forms.
    beside = 2 * (4 * size * vectors + 16 * vectors**2)
    room = W.numel() * W.element_size() + beside <= _MOST_BYTES * W.numel()
    return spread(W, threads) if room else W


def expected_vectors(rank: int, size: int) -> float:
    """How many vectors a search is expected to take for W of this smaller side.

    >>> expected_vectors(8, 768), expected_vectors(128, 768) < expected_vectors(128, 4096)
    (61.6, True)
    """
    a_rank, more = _VECTORS[_block(rank)]
    return (a_rank * rank + more) * min(1.0, max(_LEAST_SHARE, _WHOLE_SHARE - _SHARE_LESS * rank / size))


@functools.cache
def _expected_factors(size: int, block: int) -> NDArray[np.float64]:
    """`expected_factor` after 1, 2, … passes of the second space."""
    return np.array([expected_factor(size, block, 1 + passes) for passes in range(_MOST_CERTIFYING)])


def _block(rank: int) -> int:
    return _NARROW if rank < _WIDE_RANK else _WIDE


def _most_vectors(size: int, rank: int) -> int:
    return min(size - 2 * _block(rank), int(_MOST_GROWTH * expected_vectors(rank, size)))


def start_stream() -> torch.Generator:
    """For a first space's start: its quality is checked, not trusted, so that it may be the same for every W."""
    return torch.Generator().manual_seed(0)


@functools.cache
def _start(rows: int, size: int) -> NDArray[np.float32]:
    """A first space's start."""
    found: NDArray[np.float32] = gaussian(rows, size, start_stream()).numpy()
    return found


def gaussian(rows: int, size: int, stream: torch.Generator) -> Tensor:
    return torch.randn(rows, size, generator=stream, dtype=torch.float32)


def trusted_stream(key: Digest) -> torch.Generator:
    """For all other draws: decided by W's hash, and never the first space's own."""
    return torch.Generator().manual_seed(int.from_bytes(key()[:8], "big") >> 1 | 1)


def _in_one_call(W: Tensor, goal: Goal, key: Digest) -> tuple[bool, Searched | None]:
    """The search by one compiled call; and whether it left it to the search step by step. W: float32."""
    from ..kernels.cpu import search as compiled
    from ..kernels.cpu.gram import FusedGramReaders

    block, size, readers = _block(goal.rank), W.shape[1], FusedGramReaders(W, threads=1)
    fresh = gaussian(_NARROW, size, trusted_stream(key)).numpy()
    stored, layout, work = readers.of(block).compiled
    ended, basis, parts, missed, passes, spent = compiled.search(
        stored,
        layout,
        (work, readers.of(_NARROW).compiled[2]),
        _start(block, size),
        fresh,
        goal.each_rank,
        goal.numbers,
        (expected_vectors(goal.rank, size), _most_vectors(size, goal.rank)),
        LIMITS,
        _expected_factors(size, _NARROW),
        _AIMS,
        _BOUNDS,
        least_part(_NARROW),
    )
    if ended != compiled.ENDED:
        return ended == compiled.LEFT, None
    passes += spent // _NARROW
    return False, Searched(RitzPairs(*parts), torch.from_numpy(basis), missed, passes, len(basis) + spent, W)


class _Search:
    """The search step by step, for any device and dtype."""

    def __init__(
        self, W: Tensor, goal: Goal, multiply: GramReader, dtype: torch.dtype, key: Digest, threads: int
    ) -> None:
        self._device, self._size, self._dtype, self._multiply = W.device, W.shape[1], dtype, multiply
        self._goal, self._key, self._threads, self._elements = goal, key, threads, W.numel()
        self._drawn: torch.Generator | None = None
        stream = start_stream()
        self._space = KrylovSpace(multiply, self._random(_block(goal.rank), stream), stream)
        # An upper bound on what lies outside of the space, once there is one, and a second space that may give it.
        self._missed = math.inf
        self._outside: KrylovSpace | None = None
        self._most = _most_vectors(self._size, goal.rank)
        self._spent = 0

    def run(self) -> Searched | None:
        """What was found; None if the dtype turns out to be too coarse."""
        pairs = self._converge()
        while pairs is not None and not self._goal.settled(pairs, self._missed)[0]:
            other = self._look_outside(pairs)
            if other is not None:
                self._space.take(other)
                self._missed = math.inf
            elif self._goal.settled(pairs, self._missed)[0] or not self._growing():
                break
            pairs = self._converge()
        if pairs is None:
            return None
        passes = self._space.passes + self._spent // _NARROW
        return Searched(pairs, self._space.Q, self._missed, passes, self._space.size + self._spent)

    def _random(self, rows: int, stream: torch.Generator) -> Tensor:
        return gaussian(rows, self._size, stream).to(self._device, self._dtype)

    def _stream(self) -> torch.Generator:
        if self._drawn is None:
            self._drawn = trusted_stream(self._key)
        return self._drawn

    def _growing(self) -> bool:
        return self._space.room and self._space.size < self._most

    def _expected_outside(self, pairs: RitzPairs) -> float:
        return self._goal.expected_outside(pairs, float(_expected_factors(self._size, _NARROW)[_EXPECTED_PASSES - 1]))

    def _converge(self) -> RitzPairs | None:
        """Grow the space until it promises enough or is full. None if float32 is too coarse."""
        target = max(self._space.size + 1, expected_vectors(self._goal.rank, self._size))
        last = 0, math.inf
        while True:
            self._space.grow(min(target, self._most), passes=self._size)
            pairs = self._ritz()
            if self._goal.too_coarse(pairs):
                return None
            missed = self._missed
            if missed == math.inf:
                missed = self._expected_outside(pairs)
            promised = self._goal.promised(pairs, missed, enough=PROMISED)
            if promised <= PROMISED or not self._growing():
                return pairs
            size = self._space.size
            target = next_size(size, promised, *last, PROMISED)
            last = size, promised

    def _ritz(self) -> RitzPairs:
        """The space's Ritz pairs, one thread's work; where they take as long as several passes, others begin to look
        outside meanwhile.

        The passes depend on the shape alone, and one thread takes them, too: so its bits are the same.
        """
        size = self._space.size
        shared = self._device.type == "cpu" and self._dtype == torch.float32 and self._missed == math.inf
        passes = size**3 // int(_RITZ_OVER_PASS * (self._elements + 2 * size * self._size)) if shared else 0
        if passes < _LEAST_BESIDE:
            return self._space.ritz()
        begun = beside(partial(self._begun_outside, min(passes, _MOST_BESIDE), spare=1), self._threads)
        pairs = self._space.ritz()
        self._outside = begun()
        return pairs

    @property
    def _width_outside(self) -> int:
        """Columns of a second space's start."""
        return min(_NARROW, self._size - self._space.size)

    def _begun_outside(self, passes: int, spare: int = 0) -> KrylovSpace:
        """A second space, kept orthogonal to all of the first one, of so many blocks."""
        stream = self._stream()
        start = self._random(self._width_outside, stream)
        other = KrylovSpace(self._multiply, start, stream, fixed=self._space.Q)
        other.grow(math.inf, passes, spare=spare)
        return other

    def _look_outside(self, pairs: RitzPairs) -> KrylovSpace | None:
        """Lower the bound on what lies outside until all is settled. Returns what was missed, if anything."""
        other = self._outside or self._begun_outside(0)
        self._outside = None
        factors = _expected_factors(self._size, self._width_outside)
        stops = self._goal.stops_outside(pairs, factors, self._expected_outside(pairs), _AIMS, _BOUNDS)
        if other.passes == 0 or not other.stopped(*stops[other.passes - 1]):
            other.grow(math.inf, passes=_MOST_CERTIFYING - other.passes, stops=stops[other.passes :])
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
            if by_few or other.passes >= last or not other.room or not (proven or largest < MISSED * highest):
                break
            other.grow(math.inf, passes=1)
        if largest >= MISSED * highest and not proven:
            return other if self._growing() else None
        self._spent += other.size
        return None
