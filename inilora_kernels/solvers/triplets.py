"""The leading singular triplets of a matrix, and the proof of how much better any others could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def concluded(goal: Goal, pairs: RitzPairs, missed: float, last: LastPass, *, passes: int, vectors: int) -> Principal:
    """The triplets and their certificate.

    missed: the bound on λ_max outside of the space of `pairs`; infinite where there is none.
    """
    U, V, (values, _, shortfalls, certified) = (_triplets if last.X.device.type == "cpu" else _triplets_on_device)(
        last, (pairs.theta, pairs.g, goal.each_rank, missed, goal.numbers)
    )
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


def _triplets(last: LastPass, asked: tuple[Any, ...]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """U (r×d) and V (r×k), rows, and the verdict of judgement.py, which is `asked` the rest of its arguments."""
    from ..kernels.cpu.judgement import verdict
    from ..kernels.cpu.last_pass import forms, turn

    X, Y, image = last.X.numpy(), last.Y.numpy(), last.image.numpy()
    found = verdict(*forms(X, Y, image), *asked)
    turn(X, found[1])
    turn(Y, found[1])
    U, V = Y[: len(found[1])], X[: len(found[1])]
    lengths = np.sqrt(np.einsum("ij,ij->i", U, U))
    lengths[lengths == 0.0] = 1.0
    U /= lengths[:, None]
    return torch.from_numpy(U), torch.from_numpy(V), found


def _triplets_on_device(last: LastPass, asked: tuple[Any, ...]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """The same where only what is s×s comes to the CPU."""
    from ..kernels.cpu.judgement import verdict

    form = last.Y @ last.Y.T
    residuals = last.image - form @ last.X
    found = verdict(form.cpu().numpy(), (residuals @ residuals.T).cpu().numpy(), *asked)
    turn = torch.from_numpy(found[1]).to(form.device)
    V, Y = turn @ last.X, turn @ last.Y
    lengths = torch.linalg.vector_norm(Y, dim=1, keepdim=True)
    return Y / torch.where(lengths > 0, lengths, 1.0), V, found


def _leading(pairs: RitzPairs, S: Array) -> tuple[float, ...]:
    """S, and the other Ritz values' roots where the residual says that they are good to 1 %; the first `LEADING`."""
    theta, g = pairs.theta[:LEADING].clip(min=0.0), pairs.g[:LEADING]
    sure = np.square(g).sum(1) <= np.square(0.02 * theta)
    found = np.sqrt(theta)
    rank = min(len(S), LEADING)
    sure[:rank] = True
    found[:rank] = S[:rank]
    return tuple(found[sure].tolist())
