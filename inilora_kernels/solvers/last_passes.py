"""The last products of many searches on a GPU, in float64, and what they prove: few launches, and two waits for it.

As `combine` and `concluded` do it for one matrix. What is batched has shapes that follow from a matrix alone, so that
its bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.backend import GramBatch
from ..kernels.streaming import gram_product
from ..kernels.threads import each_of
from .goal import Goal
from .krylov_spaces import KrylovSpaces, host_memory, on_host
from .ritz import Array, RitzPairs
from .triplets import Principal, make_unit, proven


@dataclass(frozen=True, eq=False)
class Promise:
    """What a search found for the matrix at `index` of a batch: Ritz pairs of its first `vectors` basis vectors.

    kept: so many prove the goal, if the last pass finds what is expected. outside: c' of certificate.py.
    """

    index: int
    goal: Goal
    pairs: RitzPairs
    kept: int
    vectors: int
    outside: float


@dataclass(frozen=True, eq=False)
class _Verdict:
    """As judgement.py's: σ² (descending), the rows that make triplets of Ritz vectors, and each rank's proof."""

    promise: Promise
    squares: Array
    chosen: Array
    shortfalls: Array
    certified: NDArray[np.bool_]


def proven_together(
    batch: GramBatch, spaces: KrylovSpaces, promises: Sequence[Promise], rank: int
) -> dict[int, Principal]:
    """The triplets, on the CPU, of those matrices whose last pass certifies all of their ranks.

    rank: the largest that any matrix of the batch is decomposed for.
    """
    from ..kernels.cpu.judgement import FEW_BEYOND

    if not promises:
        return {}
    # Ritz vectors that any of them may have kept.
    width = rank + int(FEW_BEYOND)
    X = _ritz_vectors(spaces, promises, width)
    image, forms = torch.zeros_like(X), X.new_zeros(len(X), width, width)
    images: dict[int, Tensor] = {}
    for one in promises:
        W = batch.tall(one.index)
        n = W.shape[1]
        images[one.index], image[one.index, :, :n] = gram_product(W, X[one.index, :, :n])
        forms[one.index] = images[one.index] @ images[one.index].T
    residuals = torch.baddbmm(image, forms, X, alpha=-1)
    forms, grams = on_host(torch.stack([forms, torch.bmm(residuals, residuals.mT)]))
    verdicts = _verdicts(promises, forms, grams)
    certified = [one for one in verdicts if one.certified.all()]
    return _principals(batch, X, images, certified)


def _ritz_vectors(spaces: KrylovSpaces, promises: Sequence[Promise], width: int) -> Tensor:
    """The leading Ritz vectors of each matrix (c×width×n), float64, zeros where there are fewer."""
    coefficients = host_memory((spaces.count, width, spaces.room), torch.float32, spaces.device).zero_()

    def turn_back(one: Promise) -> None:
        coefficients[one.index, : one.kept, : one.vectors] = one.pairs.vectors(one.kept)

    each_of(turn_back, promises, flops=2.0 * width * max(one.vectors for one in promises) ** 2)
    return spaces.combined(coefficients)


def _verdicts(promises: Sequence[Promise], forms: Tensor, residual_grams: Tensor) -> list[_Verdict]:
    from ..kernels.cpu.judgement import verdict

    def judge(one: Promise) -> _Verdict:
        form, gram = (part[one.index, : one.kept, : one.kept].clone().numpy() for part in (forms, residual_grams))
        return _Verdict(one, *verdict(form, gram, one.goal.each_rank, one.outside, one.goal.numbers))

    return each_of(judge, promises, flops=20.0 * forms.shape[1] ** 3)


def _principals(
    batch: GramBatch, X: Tensor, images: dict[int, Tensor], verdicts: Sequence[_Verdict]
) -> dict[int, Principal]:
    """The triplets of these matrices from X and, by index, its image XWᵀ."""
    if not verdicts:
        return {}
    coefficients = host_memory((len(X), X.shape[1], X.shape[1]), X.dtype, X.device).zero_()
    for one in verdicts:
        coefficients[one.promise.index, : len(one.chosen), : one.promise.kept] = torch.from_numpy(one.chosen)
    weights = coefficients.to(X.device, non_blocking=True)
    right = torch.bmm(weights, X)
    # The rows of U are as long as a matrix's longer side, so that batched their bits would depend on the others.
    parts = [weights[one.promise.index, : len(one.chosen)] @ images[one.promise.index] for one in verdicts]
    joined = torch.cat([part.flatten() for part in parts])
    V, U = on_host(right), torch.split(on_host(joined), [part.numel() for part in parts])

    def conclude(place: int) -> tuple[int, Principal]:
        verdict, left = verdicts[place], U[place].view(parts[place].shape).clone()
        one, n = verdict.promise, batch.sizes[verdict.promise.index]
        make_unit(left)
        found = proven(
            one.goal,
            one.pairs,
            (left, verdict.squares, V[one.index, : len(left), :n].clone()),
            (verdict.shortfalls, verdict.certified),
            passes=one.vectors // batch.shape[1] + 1,
            vectors=one.vectors + one.kept,
        )
        tall = batch.tall(one.index).shape == batch.stored(one.index).shape
        return one.index, found if tall else replace(found, U=found.V, V=found.U)

    return dict(each_of(conclude, range(len(verdicts)), flops=10.0 * X[0].numel()))
