"""The minimum of ||W − BA||_F² from as few passes over W as possible: a block Krylov space, with a certificate.

The space K_q = span{Ω, MΩ, …, M^{q−1}Ω} of M = WᵀW (k×k, or WWᵀ where that is smaller) starts from a Gaussian block Ω
and is kept orthonormal against all of itself. Its Ritz pairs converge to the leading singular triplets of W faster than
subspace iteration over the same passes (Musco and Musco 2015, arXiv:1504.05477). What counts is the number of vectors
that W is multiplied with, and a narrow block needs the fewest: it is just wide enough that a pass takes as long in
arithmetic as in memory, whatever the rank. `certificate.py` bounds what the Ritz pairs still lack, from the same space,
or from a second one where singular values are too close; where that finds a direction that the first has missed, as a
narrow block does where they are equal, the two are joined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import WeightError
from ..kernels.dense import combine
from ..kernels.streaming import energy, products
from ..kernels.threads import one_torch_thread
from .goal import Goal
from .krylov_search import Key, Searched, digest, expected_vectors, search
from .triplets import LEADING, LastPass, Principal, concluded, proven

# Each rank's proven excess must be below this, or below what float32 factors can show.
TOLERANCE = 1e-8
# Up to the first size all eigenvectors of WᵀW take less time than a search; up to the second, where they are no more
# than so many times what a search would need; and beyond that, all singular vectors up to so many times.
TINY_SIZE, GRAM_SIZE, _GRAM_BELOW, _DENSE_BELOW = 300, 512, 1.2, 1.1
# Up to this size a full decomposition is the answer if the certificate is not reached.
DENSE_SIZE = 2048
# Up to so many Ritz vectors of a small W, the calls of a last pass take longer than its sums.
_CONCLUDED_AT_ONCE = 64
# Squares of squares stay in float32's range.
FLOAT32_RANGE = (1e-16, 1e16)


def principal(
    W: Tensor,
    ranks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    total: float | None = None,
) -> Principal:
    """The leading max(ranks) singular triplets of W (d×k) of any float dtype, certified for each of the ranks.

    dtype: of the products with W. Where float32 is too coarse for the certificate (M = WᵀW has the square of W's
        condition), the work is done in float64.
    tolerance: of each rank's excess f/f* − 1.
    total: ||W||_F², where it is known.

    A search's random blocks are drawn from a hash of W, so the same W gives the same bits, at any number of threads,
    and nobody can choose a W against the blocks.

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
        key = functools.cache(partial(digest, W))
        return _principal(W, tuple(dict.fromkeys(ranks)), dtype, tolerance, key, total=total, threads=threads)


def _principal(
    W: Tensor,
    ranks: Sequence[int],
    dtype: torch.dtype,
    tolerance: float,
    key: Key,
    *,
    total: float | None,
    threads: int,
) -> Principal:
    upright = W.shape[0] >= W.shape[1]
    tall = W if upright else W.T
    size = tall.shape[1]
    expected = expected_vectors(max(ranks), size)
    if GRAM_SIZE < size <= _DENSE_BELOW * expected:
        return dense(W, ranks)
    total = energy(tall) if total is None else total
    if not math.isfinite(total):
        raise WeightError(
            "the squares of its entries leave float64's range; divide the weights, and scale them back later"
        )
    if total == 0.0:
        return _nothing(W, ranks)
    if size <= TINY_SIZE or size <= min(GRAM_SIZE, _GRAM_BELOW * expected):
        small = _by_gram(tall, ranks, total)
        if small is None:
            return dense(W, ranks)
        return small if upright else replace(small, U=small.V, V=small.U)
    if W.dtype == torch.float64 or not FLOAT32_RANGE[0] < total < FLOAT32_RANGE[1]:
        dtype = torch.float64
    goal = Goal(total, tuple(ranks), tolerance, torch.finfo(dtype).eps, exact=dtype == torch.float64)
    searched = _searched(tall, goal, dtype, key, threads)
    if searched is None:
        finest = replace(goal, unit=torch.finfo(torch.float64).eps, exact=True)
        searched = _searched(tall, finest, torch.float64, key, threads)
    assert searched is not None
    found = searched
    if not all(found.certified.values()) and size <= DENSE_SIZE:
        return dense(W, ranks)
    return found if upright else replace(found, U=found.V, V=found.U)


def _searched(W: Tensor, goal: Goal, dtype: torch.dtype, key: Key, threads: int) -> Principal | None:
    """The triplets of W (d×k, d ≥ k) by products in this dtype, and one more pass in float64; None if it is too coarse.

    On the last pass the loss and the certificate rest.
    """
    searched = search(W, goal, dtype, key, threads)
    if searched is None:
        return None
    pairs, kept, outside, settled = searched.pairs, searched.kept, searched.outside, searched.settled
    passes, vectors = searched.passes, searched.vectors
    if searched.small is not None and kept <= _CONCLUDED_AT_ONCE:
        at_once = _concluded_in_one_call(searched.small, goal, searched)
        if at_once is not None:
            return at_once if _stands(at_once, goal, settled) else None
    # At high ranks the basis and its projection take two thirds of W's bytes, which the last pass needs.
    coefficients, basis, pairs = pairs.vectors(kept, threads), searched.basis, pairs.without_vectors()
    del searched
    X = combine(basis, coefficients, threads)
    del basis, coefficients
    # What float32 rounds away of the image is in the residuals, as what it has done to X.
    Y, image = products(W, X, threads, torch.float64 if goal.exact else torch.float32)
    found = concluded(
        goal,
        pairs,
        outside,
        LastPass(X, Y, image),
        passes=passes + 1,
        vectors=vectors + kept,
        threads=threads,
    )
    return found if _stands(found, goal, settled) else None


def _stands(found: Principal, goal: Goal, settled: bool) -> bool:
    """Whether float64 would find no more: what the last pass finds beyond what was promised is rounding."""
    return all(found.certified.values()) or goal.exact or not settled


def _concluded_in_one_call(W: Tensor, goal: Goal, searched: Searched) -> Principal | None:
    """The end of `_searched` by one compiled call, if nothing rare comes up. W: float32."""
    from ..kernels.cpu.conclusion import conclude
    from ..kernels.cpu.gram import FusedGramReader

    pairs, kept = searched.pairs, searched.kept
    reader = FusedGramReader(W, kept, threads=1, dtype=torch.float64)
    found, U, values, V, *proof = conclude(
        *reader.compiled,
        searched.basis.numpy(),
        pairs.theta,
        pairs.reduced,
        goal.each_rank,
        searched.outside,
        goal.numbers,
        kept,
    )
    if not found:
        return None
    triplets = torch.from_numpy(U), values, torch.from_numpy(V)
    passes, vectors = searched.passes + 1, searched.vectors + kept
    return proven(goal, pairs, triplets, (proof[0], proof[1]), passes=passes, vectors=vectors)


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


def _by_gram(W: Tensor, ranks: Sequence[int], total: float) -> Principal | None:
    """The same for a small W (d×k, d ≥ k), from all of M = WᵀW, formed and solved in float64 on the CPU.

    M's rounding, 2⁻⁵²·σ_1², is below what float32 factors can show, and enters what is captured squared. None where
    its eigenvectors do not come out accurately.
    """
    from ..kernels.cpu.eigen import leading_pairs

    wide = W.detach().cpu().double()
    count = min(W.shape[1], max(LEADING, *ranks))
    _, vectors, converged = leading_pairs((wide.T @ wide).numpy(), count)
    if not converged:
        return None
    V = torch.from_numpy(vectors).clone()
    U = V @ wide.T
    S = torch.linalg.vector_norm(U, dim=1)
    rank = max(ranks)
    U = U[:rank] / torch.where(S[:rank] > 0, S[:rank], 1.0)[:, None]
    return Principal(
        U=U.T.to(W.device),
        S=S[:rank].to(W.device),
        V=V[:rank].T.to(W.device),
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
