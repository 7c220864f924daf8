"""The least of ||W − BA||_F² in a few readings of W: a randomized block Krylov space, with a certificate.

The space K_q = span{Ω, MΩ, …, M^{q−1}Ω} of M = WᵀW (k×k, or WWᵀ where that is smaller) starts from a Gaussian block Ω
and is kept orthonormal against all of itself. Its Ritz pairs converge to the leading singular triplets of W faster than
subspace iteration over the same readings (Musco and Musco 2015, arXiv:1504.05477). `certificate.py` bounds what they
still lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..factors import FLOAT32_FLOOR
from ..kernels.streaming import energy, reading_threads
from .certificate import ritz_pairs, shortfalls
from .krylov_space import KrylovSpace

# Each rank's proven excess is to be below this, or below what float32 factors can show.
TOLERANCE = 1e-8
MOST_PASSES = 24
# Singular values kept for the picture of the spectrum, at most.
LEADING = 64
# Columns of Ω beyond the rank: the block then has room for equal singular values around its end.
_OVERSAMPLING = 8
# Before this many readings no real spectrum has converged, and looking costs as much as a reading of a small W.
_FIRST_LOOK = 5
# Ritz pairs that the certificate builds on, at most, in blocks: more cost as much as they save.
_MOST_KEPT_BLOCKS = 3
# Residuals of so many units in the last place of σ_1² are rounding.
_ROUNDING_UNITS = 32
# Up to this size a full decomposition is an answer where the certificate is not reached.
_DENSE_SIZE = 1024


@dataclass(frozen=True)
class Principal:
    """The leading singular triplets of W (d×k), W ≈ U·diag(S)·Vᵀ, and how much better any others could be.

    U (d×r), V (k×r): unit columns, orthogonal (a column of U is zero where its S is). S (r): descending. float64, on
        W's device; r is the largest rank asked for.
    shortfalls: for each rank asked for, an upper bound on Σ_{i≤rank} σ_i² minus what these triplets capture.
    leading: the singular values found to better than 1 %, the first 64 at most; for the picture of the spectrum.
    passes: readings of W, those for the certificate included.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    shortfalls: dict[int, float]
    leading: tuple[float, ...]
    passes: int


def principal(
    W: Tensor, ranks: Sequence[int], *, dtype: torch.dtype = torch.float32, tolerance: float = TOLERANCE
) -> Principal:
    """The leading max(ranks) singular triplets of W (d×k) of any float dtype, certified for each of the ranks.

    dtype: of the products with W. Where float32 is too coarse for the certificate (M = WᵀW has the square of W's
        condition), the work is done again in float64.

    The space grows until the Ritz residuals promise an excess below `tolerance`, then the certificate is computed. A
    spectrum without any decay may end above it after 24 readings of W; the shortfall then says what is known.
    The random blocks come from a fixed seed: the same W gives the same bits.

    >>> W = torch.diag(torch.arange(300.0, 0.0, -1.0)) / 300
    >>> found = principal(W, [2])
    >>> [round(float(value), 6) for value in found.S], found.shortfalls[2] < 1e-8 * 100
    ([1.0, 0.996667], True)
    """
    tall = W if W.shape[0] >= W.shape[1] else W.T
    size = tall.shape[1]
    if size <= 8 * (max(ranks) + _OVERSAMPLING):
        return dense(W, ranks)
    total = energy(tall, torch.float32)
    if W.dtype == torch.float64 or not 1e-18 < total < 1e18:
        # float32 would lose the squares of squares to its range.
        dtype, total = torch.float64, energy(tall)
    if total == 0.0:
        return _nothing(W, ranks)
    with reading_threads(tall, dtype) as threads:
        found, certified, rounded = _krylov(tall, total, ranks, dtype, tolerance, threads)
    if not certified and rounded and dtype != torch.float64:
        again, certified, _ = _krylov(tall, total, ranks, torch.float64, tolerance, torch.get_num_threads())
        found = replace(again, passes=found.passes + again.passes)
    if not certified and size <= _DENSE_SIZE:
        return dense(W, ranks)
    return found if tall is W else replace(found, U=found.V, V=found.U)


def dense(W: Tensor, ranks: Sequence[int]) -> Principal:
    """The same from a full singular value decomposition in float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    rank = max(ranks)
    leading = tuple(S[:LEADING].tolist())
    return Principal(U[:, :rank], S[:rank], Vh[:rank].T, dict.fromkeys(ranks, 0.0), leading, passes=1)


def _nothing(W: Tensor, ranks: Sequence[int]) -> Principal:
    """The triplets of an all-zero W."""
    rank = max(ranks)
    V = torch.eye(W.shape[1], rank, dtype=torch.float64, device=W.device)
    U = V.new_zeros(W.shape[0], rank)
    return Principal(U, V.new_zeros(rank), V, dict.fromkeys(ranks, 0.0), (0.0,) * rank, passes=1)


def _krylov(
    W: Tensor, total: float, ranks: Sequence[int], dtype: torch.dtype, tolerance: float, threads: int
) -> tuple[Principal, bool, bool]:
    """The triplets of W (d×k, d ≥ k) with ||W||² = total; whether the certificate came below the tolerance; and
    whether rounding may be what keeps it above: the space had converged, and there is a gap behind the triplets.
    """
    rank = max(ranks)
    block = -(-(rank + _OVERSAMPLING) // 8) * 8
    start = torch.randn(W.shape[1], block, generator=torch.Generator().manual_seed(0)).to(W.device, dtype)
    space = KrylovSpace(W, start, MOST_PASSES, threads)
    while True:
        space.expand()
        done = space.full
        if space.passes < _FIRST_LOOK and not done:
            continue
        values, vectors, residuals = space.ritz()
        kept = min(_converged(values, residuals, rank), _MOST_KEPT_BLOCKS * block)
        allowed = {r: _allowed(values, total, r, tolerance) for r in ranks}
        promised = all(_promised(values, residuals, r, kept) <= 0.1 * most for r, most in allowed.items())
        # More readings do not lessen what is rounding.
        converged = promised or float(residuals[:rank].max()) <= _ROUNDING_UNITS * torch.finfo(dtype).eps * values[0]
        if done or converged:
            break
    ritz, coefficients = ritz_pairs(space, vectors[:, :kept])
    bounds, missed, passes = shortfalls(W, ritz, allowed, dtype, threads)
    WV = space.WQ.double() @ coefficients[:, :rank]
    S = torch.linalg.vector_norm(WV, dim=0)
    sure = residuals[:kept].square() <= 0.02 * values[:kept] * (values[:kept] - missed).clamp(min=0.0)
    sure[:rank] = True
    leading = tuple(ritz.values[:LEADING][sure[:LEADING]].clamp(min=0.0).sqrt().tolist())
    found = Principal(
        U=WV / torch.where(S > 0, S, 1.0),
        S=S,
        V=ritz.X[:, :rank],
        shortfalls=bounds,
        leading=leading,
        passes=space.passes + passes,
    )
    certified = all(bounds[r] <= most for r, most in allowed.items())
    return found, certified, bool(converged) and missed < float(ritz.values[rank - 1])


def _allowed(values: Tensor, total: float, rank: int, tolerance: float) -> float:
    """How much energy may be left behind: `tolerance` of f*, and never less than float32 factors can show."""
    return max(tolerance * (total - float(values[:rank].sum())), FLOAT32_FLOOR * total)


def _converged(values: Tensor, residuals: Tensor, rank: int) -> int:
    """How many Ritz pairs are near enough to eigenpairs for the certificate to build on: at least the rank."""
    threshold = float(values[rank - 1])
    room = (threshold - values).clamp(min=1e-3 * threshold)
    usable = residuals.square() <= 0.04 * threshold * room
    usable[:rank] = True
    usable[-1] = False
    return int((~usable).nonzero()[0])


def _promised(values: Tensor, residuals: Tensor, rank: int, kept: int) -> float:
    """What the certificate will come to where the rest of the spectrum is as this space sees it."""
    gap = float(values[rank - 1] - values[kept])
    return float(residuals[:rank].square().sum()) / gap if gap > 0 else float("inf")
