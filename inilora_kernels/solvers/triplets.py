"""The leading singular triplets of a matrix, and the proof of how much better any others could be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.dense import inner, residual_gram, turn
from .goal import Goal
from .ritz import Array, RitzPairs

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

    X (s×k): the leading Ritz vectors of a space, orthonormal rows. Y (s×d): XWᵀ. image (s×k): XM. `concluded` writes
    over X and Y.
    """

    X: Tensor
    Y: Tensor
    image: Tensor


def concluded(
    goal: Goal, pairs: RitzPairs, outside: float, last: LastPass, *, passes: int, vectors: int, threads: int = 1
) -> Principal:
    """The triplets and their certificate.

    outside: c', the bound on λ_max outside of the last pass's Ritz vectors; infinite where there is none.
    """
    from ..kernels.cpu.judgement import verdict

    form = inner(last.Y, last.Y, threads)
    residuals = residual_gram(last.X, last.image, form, threads)
    values, chosen, shortfalls, certified = verdict(
        form.cpu().numpy(), residuals.cpu().numpy(), goal.each_rank, outside, goal.numbers
    )
    turned = torch.from_numpy(chosen)
    V, U = turn(last.X, turned, threads), turn(last.Y, turned, threads)
    make_unit(U)
    return proven(goal, pairs, (U, values, V), (shortfalls, certified), passes=passes, vectors=vectors)


def make_unit(rows: Tensor) -> None:
    """Give each row the length 1, in place; a row of zeros stays so."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows /= torch.where(lengths > 0, lengths, 1.0)


def proven(
    goal: Goal,
    pairs: RitzPairs,
    triplets: tuple[Tensor, Array, Tensor],
    proof: tuple[Array, NDArray[np.bool_]],
    *,
    passes: int,
    vectors: int,
) -> Principal:
    """The triplets, as U (r×d), σ² (r or more) and V (r×k), and their proof, as verdict of judgement.py gives it."""
    (U, values, V), (shortfalls, certified) = triplets, proof
    S = np.sqrt(values[: goal.rank])
    return Principal(
        U=U.T,
        S=torch.from_numpy(S).to(V.device),
        V=V.T,
        shortfalls=dict(zip(goal.ranks, shortfalls.tolist(), strict=True)),
        certified=dict(zip(goal.ranks, certified.tolist(), strict=True)),
        energy=goal.energy,
        leading=_leading(pairs, S),
        passes=passes,
        vectors=vectors,
    )


def _leading(pairs: RitzPairs, S: Array) -> tuple[float, ...]:
    """S, and the other Ritz values' roots where the residual says that they are good to 1 %; the first `LEADING`."""
    from ..kernels.cpu.judgement import sure_values

    found = S[:LEADING].tolist()
    return (*found, *sure_values(pairs.theta, pairs.g, len(found), LEADING).tolist())
