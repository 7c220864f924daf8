"""The minimum of ||W − BA||_F² from as few passes over W as possible: a block Krylov space, with a certificate.

The space K_q = span{Ω, MΩ, …, M^{q−1}Ω} of M = WᵀW (k×k, or WWᵀ where that is smaller) starts from a Gaussian block Ω
and is kept orthonormal against all of itself. Its Ritz pairs converge to the leading singular triplets of W faster than
subspace iteration over the same passes (Musco and Musco 2015, arXiv:1504.05477). What counts is the number of vectors
that W is multiplied with, and a narrow block needs the fewest: it is just wide enough that a pass takes as long in
arithmetic as in memory, whatever the rank. `certificate.py` bounds what the Ritz pairs still lack, from a second space;
where that finds a direction that the first has missed, as a narrow block does where singular values are equal, the two
are joined.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import WeightError
from ..kernels.streaming import energy, gram_multiplier, products
from ..kernels.threads import one_torch_thread
from .certificate import missed_factor
from .goal import Goal
from .krylov_space import KrylovSpace, RitzPairs
from .triplets import LEADING, LastPass, Principal, concluded

# Each rank's proven excess must be below this, or below what float32 factors can show.
TOLERANCE = 1e-8
# Up to the first size all eigenvectors of WᵀW take less time than a search; up to the second, where they are no more
# than so many times what a search would need; and beyond that, all singular vectors up to so many times.
TINY_SIZE, GRAM_SIZE, _GRAM_BELOW, _DENSE_BELOW = 300, 512, 2.4, 1.1
# Up to this size a full decomposition is the answer if the certificate is not reached.
DENSE_SIZE = 2048
# A pass with four columns is about as long in arithmetic as in memory on two cores with AVX-512; more columns multiply
# faster and converge more slowly, which pays where the space is large anyway.
_NARROW, _WIDE, _WIDE_RANK = 4, 8, 48
# Vectors that a real spectrum takes to converge: about this many times the rank, plus a constant; and those of a large
# matrix by wide blocks. They decide when to look, since a look costs an eigenvalue problem of the space's size.
_VECTORS_A_RANK, _VECTORS_MORE = 3.75, 34
_LARGE_SIZE, _LARGE_A_RANK, _LARGE_MORE = 1536, 4.1, 44
# The space may grow to this many times that before the search is given up.
_MOST_GROWTH = 10
# The space has converged when its promise is below this share of what the certificate must reach.
PROMISED = 0.5
# A second space whose Ritz values come this close to θ_r has found what the first one missed.
MISSED = 0.985
# It has found enough where λ_max outside is below so many times θ_r, or what was expected: the first that settles all.
_BOUNDS = (0.98, 0.96, 0.93, 0.9)
# Passes of the second space before it may be judged.
_JUDGED_AFTER = 4
# As many as are worth having for a first space that need not grow on.
_EXPECTED_PASSES = 18
_MOST_CERTIFYING = 64
# Squares of squares stay in float32's range.
FLOAT32_RANGE = (1e-16, 1e16)


# The sha256 of W's bytes.
Digest = Callable[[], bytes]


def principal(
    W: Tensor,
    ranks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    digest: Digest | None = None,
) -> Principal:
    """The leading max(ranks) singular triplets of W (d×k) of any float dtype, certified for each of the ranks.

    dtype: of the products with W. Where float32 is too coarse for the certificate (M = WᵀW has the square of W's
        condition), the work is done in float64.
    tolerance: of each rank's excess f/f* − 1.
    digest: the sha256 of W's bytes, if it is computed anyway. The certificate's random block is drawn from it, so
        the same W gives the same bits, at any number of threads, and nobody can choose a W against the block.

    The space grows until its Ritz residuals promise an excess below `tolerance`, then the certificate is computed.
    If it is not reached, which takes a flat spectrum, a W of up to 2048 on its smaller side is decomposed in full; a
    larger one is returned with `certified` False and a shortfall that says what is known. Raises WeightError where
    W's squares leave float64's range.

    >>> W = torch.diag(torch.arange(300.0, 0.0, -1.0)) / 300
    >>> found = principal(W, [2])
    >>> [round(float(value), 6) for value in found.S], found.certified[2]
    ([1.0, 0.996667], True)
    """
    with one_torch_thread() as threads:
        # Only a search asks for it, and a second attempt in float64 asks once more.
        key = functools.cache(digest or partial(_sha256, W))
        return _principal(W, tuple(dict.fromkeys(ranks)), dtype, tolerance, key, threads)


def _principal(
    W: Tensor, ranks: Sequence[int], dtype: torch.dtype, tolerance: float, key: Digest, threads: int
) -> Principal:
    upright = W.shape[0] >= W.shape[1]
    tall = W if upright else W.T
    size = tall.shape[1]
    expected = _expected_vectors(max(ranks), size)
    if GRAM_SIZE < size <= _DENSE_BELOW * expected:
        return dense(W, ranks)
    total = energy(tall)
    if not math.isfinite(total):
        raise WeightError(
            "the squares of its entries leave float64's range; divide the weights, and scale them back later"
        )
    if total == 0.0:
        return _nothing(W, ranks)
    if size <= TINY_SIZE or size <= min(GRAM_SIZE, _GRAM_BELOW * expected):
        found = _by_gram(tall, ranks, total)
        return found if upright else replace(found, U=found.V, V=found.U)
    if W.dtype == torch.float64 or not FLOAT32_RANGE[0] < total < FLOAT32_RANGE[1]:
        dtype = torch.float64
    searched = _Search(tall, total, ranks, dtype, tolerance, key=key, threads=threads).run()
    if searched is None:
        searched = _Search(tall, total, ranks, torch.float64, tolerance, key=key, threads=threads).run()
    assert searched is not None
    found = searched
    if not all(found.certified.values()) and size <= DENSE_SIZE:
        return dense(W, ranks)
    return found if upright else replace(found, U=found.V, V=found.U)


def dense(W: Tensor, ranks: Sequence[int]) -> Principal:
    """The same from a full singular value decomposition in float64."""
    with one_torch_thread():
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    rank = max(ranks)
    return Principal(
        U=U[:, :rank],
        S=S[:rank],
        V=Vh[:rank].T,
        shortfalls=dict.fromkeys(ranks, 0.0),
        certified=dict.fromkeys(ranks, True),
        energy=float(S.square().sum()),
        leading=tuple(S[:LEADING].tolist()),
        passes=1,
        vectors=min(W.shape),
    )


def _by_gram(W: Tensor, ranks: Sequence[int], total: float) -> Principal:
    """The same for a small W (d×k, d ≥ k), from all eigenvectors of M = WᵀW, formed and solved in float64.

    M's rounding, 2⁻⁵²·σ_1², is below what float32 factors can show, and enters what is captured squared.
    """
    wide = W.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    V = vectors.flip(1)[:, : max(LEADING, *ranks)]
    Y = wide @ V
    S = torch.linalg.vector_norm(Y, dim=0)
    rank = max(ranks)
    U = Y[:, :rank] / torch.where(S[:rank] > 0, S[:rank], 1.0)
    return Principal(
        U=U,
        S=S[:rank],
        V=V[:, :rank],
        shortfalls=dict.fromkeys(ranks, 0.0),
        certified=dict.fromkeys(ranks, True),
        energy=total,
        leading=tuple(S[:LEADING].tolist()),
        passes=2,
        vectors=W.shape[1],
    )


def _nothing(W: Tensor, ranks: Sequence[int]) -> Principal:
    """The triplets of an all-zero W."""
    rank = max(ranks)
    V = torch.eye(W.shape[1], rank, dtype=torch.float64, device=W.device)
    U = V.new_zeros(W.shape[0], rank)
    return Principal(
        U=U,
        S=V.new_zeros(rank),
        V=V,
        shortfalls=dict.fromkeys(ranks, 0.0),
        certified=dict.fromkeys(ranks, True),
        energy=0.0,
        leading=(0.0,) * rank,
        passes=1,
        vectors=0,
    )


def _sha256(W: Tensor) -> bytes:
    stored = W if W.is_contiguous() else W.contiguous()
    return hashlib.sha256(stored.cpu().view(torch.uint8).numpy().data).digest()


def _expected_vectors(rank: int, size: int) -> float:
    if rank >= _WIDE_RANK and size >= _LARGE_SIZE:
        return _LARGE_A_RANK * rank + _LARGE_MORE
    return _VECTORS_A_RANK * rank + _VECTORS_MORE


@functools.cache
def _missed_factors(size: int, block: int) -> NDArray[np.float64]:
    """`missed_factor` after 1, 2, … passes of the second space."""
    return np.array([missed_factor(size, block, 1 + passes) for passes in range(_MOST_CERTIFYING)])


class _Search:
    """One attempt in one dtype at the triplets of W (d×k, d ≥ k) with ||W||² = total."""

    def __init__(
        self,
        W: Tensor,
        total: float,
        ranks: Sequence[int],
        dtype: torch.dtype,
        tolerance: float,
        *,
        key: Digest,
        threads: int,
    ) -> None:
        self._W, self._dtype, self._key, self._threads = W, dtype, key, threads
        self._goal = Goal(total, tuple(ranks), tolerance, torch.finfo(dtype).eps, exact=dtype == torch.float64)
        self._rank = max(ranks)
        self._size = W.shape[1]
        self._multiply = gram_multiplier(W, dtype, threads)
        self._fixed_stream = torch.Generator().manual_seed(0)
        self._drawn: torch.Generator | None = None
        block = _NARROW if self._rank < _WIDE_RANK else _WIDE
        self._space = KrylovSpace(self._multiply, self._random(block, self._fixed_stream), self._fixed_stream)
        # An upper bound on what lies outside of the space, once there is one.
        self._missed = math.inf
        self._most = min(self._size - 2 * block, int(_MOST_GROWTH * _expected_vectors(self._rank, self._size)))
        self._spent = 0

    def run(self) -> Principal | None:
        """The triplets found; None if float32 turns out to be too coarse."""
        pairs = self._converge()
        while pairs is not None and not self._goal.settled(pairs, self._missed):
            other = self._look_outside(pairs)
            if other is not None:
                self._space.take(other)
                self._missed = math.inf
            elif self._goal.settled(pairs, self._missed) or not self._growing():
                break
            pairs = self._converge()
        if pairs is None:
            return None
        found = self._finish(pairs)
        # What the last pass finds beyond what was promised is rounding.
        if all(found.certified.values()) or self._goal.exact or not self._goal.settled(pairs, self._missed):
            return found
        return None

    def _random(self, rows: int, stream: torch.Generator) -> Tensor:
        return torch.randn(rows, self._size, generator=stream, dtype=torch.float32).to(self._W.device, self._dtype)

    def _stream(self) -> torch.Generator:
        """Decided by W's hash, for all draws except the first space's start, whose quality is checked, not trusted."""
        if self._drawn is None:
            self._drawn = torch.Generator().manual_seed(int.from_bytes(self._key()[:8], "big") >> 1)
        return self._drawn

    def _growing(self) -> bool:
        return self._space.room and self._space.size < self._most

    def _expected_outside(self, pairs: RitzPairs) -> float:
        return self._goal.expected_outside(pairs, float(_missed_factors(self._size, _NARROW)[_EXPECTED_PASSES - 1]))

    def _converge(self) -> RitzPairs | None:
        """Grow the space until it promises enough or is full. None if float32 is too coarse."""
        target = max(self._space.size + 1, _expected_vectors(self._rank, self._size))
        last: tuple[int, float] | None = None
        while True:
            self._space.grow(min(target, self._most), passes=self._size)
            pairs = self._space.ritz()
            if self._goal.too_coarse(pairs):
                return None
            missed = self._missed
            if missed == math.inf:
                missed = self._expected_outside(pairs)
            promised = self._goal.promised(pairs, missed, enough=PROMISED)
            if promised <= PROMISED or not self._growing():
                return pairs
            # Residuals fall by about the same factor with each pass: look again when they should be small enough.
            size = self._space.size
            step = 0.12 * size
            if last is not None and math.isfinite(promised) and promised < last[1] and math.isfinite(last[1]):
                rate = math.log(last[1] / promised) / (size - last[0])
                step = min(max(math.log(promised / PROMISED) / rate, 1.0), 0.3 * size)
            last = size, promised
            target = size + step

    def _look_outside(self, pairs: RitzPairs) -> KrylovSpace | None:
        """Lower the bound on what lies outside until all is settled. Returns what was missed, if anything."""
        stream = self._stream()
        start = self._random(min(_NARROW, self._size - self._space.size), stream)
        other = KrylovSpace(self._multiply, start, stream, fixed=self._space.Q)
        rounding = self._goal.rounding(pairs)
        highest = float(pairs.theta[self._rank - 1])
        bounds = [*(c * highest for c in _BOUNDS), self._expected_outside(pairs)]
        enough = next((bound for bound in bounds if self._goal.settled(pairs, bound)), bounds[-2])
        factors = _missed_factors(self._size, len(start))
        stops = np.column_stack([(enough - rounding) / factors - rounding, np.full(len(factors), MISSED * highest)])
        stops[: _JUDGED_AFTER - 1] = (0.0, math.inf)
        other.grow(math.inf, passes=_MOST_CERTIFYING, stops=stops)
        if other.passes == 0:
            return None
        largest = other.largest()
        self._missed = min(self._missed, float(factors[other.passes - 1]) * (largest + rounding) + rounding)
        if largest >= MISSED * highest and not self._goal.settled(pairs, self._missed):
            return other if self._growing() else None
        self._spent += other.size
        return None

    def _finish(self, pairs: RitzPairs) -> Principal:
        """The triplets, from one more pass in float64, on which the loss and the certificate rest."""
        kept = self._goal.kept(pairs, self._missed)
        X = self._space.vectors(pairs.vectors[:, :kept])
        Y, image = products(self._W, X, self._threads)
        return concluded(
            self._goal,
            pairs,
            self._missed,
            LastPass(X, Y, image),
            passes=self._space.passes + self._spent // _NARROW + 1,
            vectors=self._space.size + self._spent + kept,
        )
