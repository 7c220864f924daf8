"""f*, the least that ||W − BA||_F² can be at a rank: what every result is measured against (Eckart–Young)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.streaming import losses
from .krylov import LEADING, principal

# Up to this size (the smaller side) all singular values cost less than their bound is worth.
_EXACT_SIZE = 512
# (A, B) rounded to float32 and the strips' sums move f by less than this share of ||W||².
ROUNDING_SHARE = 2.0**-44
_STRIP_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Optimum:
    """loss: f* = Σ_{i>r} σ_i², or just below it.  energy: ||W||_F² = Σ σ_i².  leading: the first σ_i, at most 64."""

    loss: float
    energy: float
    leading: tuple[float, ...]


def optimum(W: Tensor, rank: int) -> Optimum:
    """f* and ||W||² of a matrix W (d×k) of any float dtype.

    Where the smaller side is at most 512, the σ_i² are all the eigenvalues of the smaller of WWᵀ and WᵀW, formed and
    solved in float64: exact to about 1e-16·||W||². Larger matrices are never squared: `principal` finds the leading
    singular triplets, and f* is reported as their error less what they can have left behind: never above the true f*,
    and below it by at most about 1e-8 of it where the spectrum decays at all. W is read in strips in its own dtype.

    >>> found = optimum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    >>> round(found.loss, 12), found.energy
    (5.0, 14.0)
    """
    return optima(W, [rank])[rank]


def optima(W: Tensor, ranks: Sequence[int]) -> dict[int, Optimum]:
    """`optimum` for each of several ranks, from the same readings of W."""
    if min(W.shape) <= _EXACT_SIZE:
        squares, energy = _all_squares(W)
        leading = tuple(squares[:LEADING].sqrt().tolist())
        return {rank: Optimum(float(squares[rank:].sum()), energy, leading) for rank in ranks}
    found = principal(W, ranks)
    factors = [((found.V[:, :rank] * found.S[:rank]).T.float(), found.U[:, :rank].float()) for rank in ranks]
    energy, reached = losses(W, factors)
    return {
        rank: Optimum(least(loss, found.shortfalls[rank], energy), energy, found.leading)
        for rank, loss in zip(ranks, reached, strict=True)
    }


def least(loss: float, shortfall: float, energy: float) -> float:
    """The lower bound on f* that factors with this loss prove when their vectors' `shortfall` is known."""
    return max(0.0, loss - shortfall - ROUNDING_SHARE * energy)


def rank_for_energy(W: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps `share` (0 to 1) of W's energy: Σ_{i≤r} σ_i² ≥ share·||W||².

    >>> rank_for_energy(torch.diag(torch.tensor([3.0, 2.0, 1.0])), share=0.9)
    2
    """
    full = min(W.shape)
    if full <= _EXACT_SIZE:
        squares, energy = _all_squares(W)
        return _first_to_keep(squares, share * energy)
    energy = losses(W, [])[0]
    guess = 16
    while True:
        guess = min(guess, full)
        squares = principal(W, [guess]).S.square()
        if guess == full or float(squares.sum()) >= share * energy:
            return _first_to_keep(squares, share * energy)
        guess *= 2


def _first_to_keep(squares: Tensor, wanted: float) -> int:
    kept = squares.cumsum(0) >= wanted * (1 - 1e-12)
    return int(kept.nonzero()[0]) + 1 if bool(kept.any()) else len(squares)


def _all_squares(W: Tensor) -> tuple[Tensor, float]:
    """σ_i² (descending) and their sum, through the float64 Gram matrix of the smaller side."""
    if W.shape[0] > W.shape[1]:
        W = W.T
    gram = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64, device=W.device)
    columns = max(1, _STRIP_ELEMENTS // W.shape[0])
    for start in range(0, W.shape[1], columns):
        strip = W[:, start : start + columns].double()
        gram.addmm_(strip, strip.T)
    return torch.linalg.eigvalsh(gram).clamp_(min=0.0).flip(0), float(gram.trace())
