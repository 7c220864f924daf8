"""The leading singular triplets of a matrix, and the proof of how much better any others could be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factors import FLOAT32_FLOOR
from .certificate import bound_outside, shortfall
from .goal import Goal
from .krylov_space import RitzPairs

# At most this many singular values are kept for the picture of the spectrum.
LEADING = 64
# Sums over W in float64 move f* by less than this share of ||W||².
ROUNDING_SHARE = 2.0**-44


@dataclass(frozen=True, eq=False)
class Principal:
    """The leading singular triplets of W (d×k), W ≈ U·diag(S)·Vᵀ, and how much better any others could be.

    U (d×r), V (k×r): unit columns, orthogonal (a column of U is zero where its S is). S (r): descending. float64, on
        W's device; r is the largest requested rank.
    shortfalls: for each requested rank, an upper bound on Σ_{i≤rank} σ_i² minus what these triplets capture.
    certified: for each rank, whether that is below the requested tolerance, or below float32's resolution of W.
    energy: ||W||_F².
    leading: the singular values found to better than 1 %, the first 64 at most; for the picture of the spectrum.
    passes: over W, those for the certificate included.
    vectors: how many W was multiplied with, on both sides.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    shortfalls: dict[int, float]
    certified: dict[int, bool]
    energy: float
    leading: tuple[float, ...]
    passes: int
    vectors: int

    def optimum(self, rank: int) -> float:
        """f* = Σ_{i>rank} σ_i², or a proven lower bound just below it."""
        missing = self.energy - float(self.S[:rank].square().sum())
        return max(0.0, missing - self.shortfalls[rank] - ROUNDING_SHARE * self.energy)


@dataclass(frozen=True, eq=False)
class LastPass:
    """What the proof rests on, all in float64.

    X (k×s): the leading Ritz vectors of a space, orthonormal. Y (d×s): WX. image (k×s): MX.
    """

    X: Tensor
    Y: Tensor
    image: Tensor


def concluded(goal: Goal, pairs: RitzPairs, missed: float, last: LastPass, *, passes: int, vectors: int) -> Principal:
    """The triplets and their certificate.

    missed: the bound on λ_max outside of the space of `pairs`; infinite where there is none.
    """
    rank, total = goal.rank, goal.energy
    form = last.Y.T @ last.Y
    # On the CPU, where a matrix so small is decomposed at once.
    values_here, rotation = torch.linalg.eigh(form.cpu())
    values_here, rotation = values_here.flip(0).clamp(min=0.0), rotation.flip(1)
    turn = rotation.to(form.device)
    X, Y, residuals = last.X @ turn[:, :rank], last.Y @ turn[:, :rank], last.image - last.X @ form
    residual_gram = rotation.T @ (residuals.T @ residuals).cpu() @ rotation
    outside = math.inf
    if math.isfinite(missed):
        outside = bound_outside(pairs, len(form), missed, goal.rounding(pairs))
    shortfalls, certified = {}, {}
    for one in goal.ranks:
        missing = max(0.0, total - float(values_here[:one].sum()))
        bound = missing
        if math.isfinite(outside):
            bound = min(bound, shortfall(values_here, residual_gram, one, outside))
        shortfalls[one] = bound
        certified[one] = bound <= max(goal.tolerance * (missing - bound), FLOAT32_FLOOR * total)
    S = values_here.sqrt()
    lengths = torch.linalg.vector_norm(Y, dim=0)
    sure = pairs.coupling.square().sum(0) <= (0.02 * pairs.values.clamp(min=0.0)).square()
    sure[:rank] = True
    leading = pairs.values.clamp(min=0.0).sqrt()
    leading[:rank] = S[:rank]
    found = leading[:LEADING][sure[:LEADING]]
    return Principal(
        U=Y / torch.where(lengths > 0, lengths, 1.0),
        S=S[:rank].to(X.device),
        V=X,
        shortfalls=shortfalls,
        certified=certified,
        energy=total,
        leading=tuple(found.tolist()),
        passes=passes,
        vectors=vectors,
    )
