"""When a search for the leading singular triplets of one W may stop: what it has to prove, and what it has proven.

How small the excess must be, and how much of it must be promised before the proof, is in krylov.py: `TOLERANCE` and
`PROMISED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..factors import FLOAT32_FLOOR
from .certificate import promise
from .krylov_space import RitzPairs

# Before the second space has bounded λ_max outside of the first: this share of the Ritz values beyond θ_r is above it
# (0.15 to 0.3 where it pays to look); and the bound is at most this share of θ_r.
_REACHED, _EXPECTED_OUTSIDE = 0.17, 0.93
# The arithmetic is too coarse where what it hides comes to this share of θ_r − c', or f* to this little of the energy.
_COARSE_GAP, _COARSE_ENERGY = 0.05, 1e-5
# Projections are float32's own, also where products are less exact.
_FLOAT32_UNIT = 2.0**-23
# Roundings are independent: what they leave in a residual was a 6th to a 50th of the most that `rounding` allows for.
_EXPECTED_NOISE = 0.25
# A proof of this share of what is allowed survives that the last products are float64's.
_AMPLE = 0.5


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

    def rounding(self, pairs: RitzPairs) -> float:
        """By how much a step of the space, MX = QT + NL, can be off for a unit vector; see certificate.py."""
        largest = max(0.0, float(pairs.theta[0]))
        projecting = min(self.unit, _FLOAT32_UNIT) * math.sqrt(len(pairs.theta)) * largest
        return self.unit * math.sqrt(largest * self.energy) + projecting

    def noise(self, pairs: RitzPairs) -> float:
        """What a Ritz pair's residual is expected to have of it; the last pass finds how much it really is."""
        return _EXPECTED_NOISE * self.rounding(pairs)

    def allowed(self, pairs: RitzPairs, rank: int) -> float:
        """How much energy may be missed: `tolerance` of f*, and never less than float32 factors can show."""
        return max(self.tolerance * self.missing(pairs, rank), FLOAT32_FLOOR * self.energy)

    def missing(self, pairs: RitzPairs, rank: int) -> float:
        """What the Ritz pairs have not captured: f* and the energy they missed."""
        return max(0.0, self.energy - float(pairs.captured[rank - 1]))

    def promised(self, pairs: RitzPairs, missed: float, enough: float = 0.0) -> float:
        """The promise of the rank that is furthest from its allowance, as a multiple of the allowance.

        missed: a bound on λ_max outside of the space.
        enough: a multiple below which it does not matter how much better it could be.
        """
        rounding, noise = self.rounding(pairs), self.noise(pairs)
        worst = 0.0
        for rank in self.ranks:
            allowed = self.allowed(pairs, rank)
            if self.missing(pairs, rank) > allowed:
                worst = max(worst, promise(pairs, rank, missed, rounding, noise, enough * allowed)[0] / allowed)
        return worst

    def settled(self, pairs: RitzPairs, missed: float) -> bool:
        """Whether every rank is proven, if the last pass finds no more noise than is expected."""
        return self.promised(pairs, missed, enough=1.0) <= 1.0

    def expected_outside(self, pairs: RitzPairs, factor: float) -> float:
        """Roughly how a second space will bound λ_max outside of this one, judging by how far the Ritz values reach.

        factor: `missed_factor` of as many passes as the second space may reasonably take.
        """
        highest = max(0.0, float(pairs.theta[self.rank - 1]))
        place = self.rank + int(_REACHED * (len(pairs.theta) - self.rank))
        reached = factor * max(0.0, float(pairs.theta[min(place, len(pairs.theta) - 1)]))
        return min(_EXPECTED_OUTSIDE * highest, reached)

    def too_coarse(self, pairs: RitzPairs) -> bool:
        """Whether the products' rounding hides what must be proven."""
        if self.exact:
            return False
        highest = float(pairs.theta[self.rank - 1])
        rounding = self.rounding(pairs)
        hidden = self.rank * self.noise(pairs) ** 2 / (_COARSE_GAP * max(highest, 1e-300))
        return (
            rounding > _COARSE_GAP**2 * highest
            or any(self.missing(pairs, rank) < _COARSE_ENERGY * self.energy for rank in self.ranks)
            or any(hidden > self.allowed(pairs, rank) for rank in self.ranks)
        )

    def kept(self, pairs: RitzPairs, missed: float) -> int:
        """How many Ritz vectors the proof of all ranks uses."""
        rounding, noise = self.rounding(pairs), self.noise(pairs)
        proofs = [
            promise(pairs, rank, missed, rounding, noise, _AMPLE * self.allowed(pairs, rank)) for rank in self.ranks
        ]
        return min(max(kept for _, kept, _ in proofs), len(pairs.theta))
