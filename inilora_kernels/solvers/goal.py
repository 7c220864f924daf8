"""When a search for the leading singular triplets of one W may stop: what it has to prove, and what it has proven.

How small the excess must be, and how much of it must be promised before the proof, is in krylov.py: `TOLERANCE` and
`PROMISED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..factors import FLOAT32_FLOOR
from .ritz import Array, RitzPairs


@dataclass(frozen=True)
class Goal:
    """An excess f/f* − 1 below `tolerance` for each of `ranks`, proven.

    energy: ||W||_F².
    unit: the relative error of one product with W, as `rounding` uses it.
    exact: whether the arithmetic is float64, the finest there is.
    """

    energy: float
    ranks: tuple[int, ...]
    tolerance: float
    unit: float
    exact: bool

    @property
    def rank(self) -> int:
        """The largest one."""
        return max(self.ranks)

    @cached_property
    def numbers(self) -> tuple[float, float, float, float]:
        """As judgement.py takes it."""
        return float(self.energy), float(self.tolerance), FLOAT32_FLOOR, float(self.unit)

    @cached_property
    def each_rank(self) -> NDArray[np.int64]:
        """The ranks, as judgement.py takes them."""
        return np.array(self.ranks, dtype=np.int64)

    def rounding(self, pairs: RitzPairs) -> float:
        """By how much a step of the space, MX = QT + NL, can be off for a unit vector; see certificate.py."""
        return float(_judgement().rounding(pairs.theta, self.numbers))

    def promised(self, pairs: RitzPairs, missed: float, enough: float = 0.0) -> float:
        """The promise of the rank that is furthest from its allowance, as a multiple of the allowance.

        missed: a bound on λ_max outside of the space.
        enough: a multiple below which it does not matter how much better it could be.
        """
        judgement = _judgement()
        return float(
            judgement.promised(pairs.theta, pairs.g, self.each_rank, missed, self.numbers, enough, judgement.ANY_BEYOND)
        )

    def counted(self, pairs: RitzPairs, least: float) -> tuple[int, float, float]:
        """How many Ritz vectors the count proves every rank by, if the last pass finds what is expected; and c'.

        0 where it does not; then third, the least bound on |F| of certificate.py, as a multiple of `least`, its ε.
        """
        from ..kernels.cpu.counting import counted

        if pairs.rho is None:
            return 0, math.inf, math.inf
        kept, outside, bound = counted(pairs.theta, pairs.g, pairs.rho, self.each_rank, self.numbers, least)
        return int(kept), float(outside), float(bound)

    def separable(self, pairs: RitzPairs) -> bool:
        """Whether the count could prove every rank if the Ritz values were exact."""
        from ..kernels.cpu import counting

        return bool(counting.separable(pairs.theta, self.each_rank, self.numbers))

    def settled(self, pairs: RitzPairs, missed: float) -> tuple[bool, bool]:
        """Whether every rank is proven, if the last pass finds no more noise than is expected; and by few vectors."""
        found: tuple[bool, bool] = _judgement().settled(pairs.theta, pairs.g, self.each_rank, missed, self.numbers)
        return found

    def outside(self, pairs: RitzPairs, kept: int, missed: float) -> float:
        """c', what λ_max outside of so many Ritz vectors is at most; infinite where nothing is known."""
        return float(_judgement().outside_kept(pairs.theta, pairs.g, kept, missed, self.numbers))

    def expected_outside(self, pairs: RitzPairs, factor: float) -> float:
        """Roughly how a second space will bound λ_max outside of this one, judging by how far the Ritz values reach.

        factor: `expected_factor` of as many passes as the second space may reasonably take.
        """
        return float(_judgement().expected_outside(pairs.theta, self.rank, factor))

    def too_coarse(self, pairs: RitzPairs) -> bool:
        """Whether the products' rounding hides what must be proven."""
        return not self.exact and bool(_judgement().too_coarse(pairs.theta, self.each_rank, self.numbers))

    def stops_outside(
        self, pairs: RitzPairs, factors: Array, expected: float, bounds: Array, first: int, missed: float
    ) -> Array:
        """The λ_max at which a second space may end, (passes, 2), as judgement.py has it."""
        found: Array = _judgement().stops_outside(
            pairs.theta, pairs.g, self.each_rank, self.numbers, factors, expected, bounds, first, missed
        )
        return found

    def kept(self, pairs: RitzPairs, missed: float) -> int:
        """How many Ritz vectors the proof of all ranks uses."""
        return int(_judgement().kept(pairs.theta, pairs.g, self.each_rank, missed, self.numbers))


def next_size(size: int, promised: float, before: int, then: float, wanted: float) -> float:
    """How many vectors to have at the next look, when the promise should have come down to `wanted`.

    Residuals fall by about the same factor with each pass. promised: at `size` vectors; then: at `before`, infinite
    where there is none.

    >>> round(next_size(80, 4.0, 60, 400.0, wanted=1.0))
    86
    """
    return float(_judgement().next_size(size, promised, before, then, wanted))


def next_count(size: int, block: int, bound: float, before: int, then: float) -> float:
    """How many vectors to have when the count is tried again; 0 where a second space will take fewer.

    block: vectors of a pass. bound: on |F|, as a multiple of ε, at `size` vectors; then: at `before`, infinite where
    there is none.

    >>> round(next_count(80, 4, 4.0, 76, 16.0)), next_count(80, 4, 4.0, 76, 4.0)
    (84, 0.0)
    """
    from ..kernels.cpu import counting

    return float(counting.next_count(size, block, bound, before, then))


def _judgement() -> Any:
    """judgement.py, at its first use: numba takes as long to import as all the rest."""
    from ..kernels.cpu import judgement

    return judgement
