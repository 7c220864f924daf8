"""Two systems compared over the same seeds and the same examples: how far apart, how surely, and whether the same.

Both differ by seed (start, order of the data) and by example, and a mean over both is uncertain for both reasons. The
standard error is that of a bootstrap which draws seeds and examples, each with replacement, independently of each other
("The pigeonhole bootstrap", Owen, Annals of Applied Statistics 1, 2007; it errs on the wide side).
Where examples come in groups, such as problems of one template, groups are drawn. Intervals and p-values take the t
distribution with one degree of freedom less than there are seeds, for five seeds say little about their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Array = NDArray[np.float64]
DRAWS = 4000


@dataclass(frozen=True)
class Comparison:
    """difference: the mean of ours − theirs; error: its standard error; seeds: pairs of runs."""

    difference: float
    error: float
    seeds: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = float(t.ppf((1 + level) / 2, self.seeds - 1)) * self.error
        return self.difference - half, self.difference + half

    @property
    def p(self) -> float:
        """Two-sided, against no difference.

        >>> Comparison(0.0, 0.1, 5).p
        1.0
        """
        return 2 * self._beyond(abs(self.difference))

    def equivalence(self, margin: float) -> float:
        """p of the two one-sided tests that the difference lies outside ±margin (TOST: Schuirmann, 1987).

        Below 0.05 just when the 90 % interval lies within ±margin.
        """
        return self._beyond(margin - abs(self.difference))

    def _beyond(self, distance: float) -> float:
        if self.error == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(t.sf(distance / self.error, self.seeds - 1))


def compare(ours: Array, theirs: Array, groups: Sequence[Hashable] | None = None, draws: int = DRAWS) -> Comparison:
    """Compare how each seed (row) did on each example (column); the same row of both is a pair with the same seed.

    groups: the group of each example; None: every example is one of its own.

    >>> ours, theirs = np.array([[1.0, 0.0], [1.0, 1.0]]), np.zeros((2, 2))
    >>> compare(ours, theirs).difference
    0.75
    """
    differences = ours - theirs
    seeds, examples = differences.shape
    if seeds < 2:
        raise ValueError("one seed alone says nothing about the spread over seeds; give at least two")
    names = list(dict.fromkeys(groups if groups is not None else range(examples)))
    place = {name: at for at, name in enumerate(names)}
    member = np.zeros((examples, len(names)))
    member[np.arange(examples), [place[name] for name in (groups if groups is not None else range(examples))]] = 1
    sums, sizes = differences @ member, member.sum(0)
    of_seeds, of_groups = _drawn(seeds, len(names), draws)
    means = ((of_seeds @ sums) * of_groups).sum(1) / (seeds * (of_groups @ sizes))
    # Drawing n of n makes the spread too small by √((n − 1)/n).
    error = float(means.std()) * math.sqrt(seeds / (seeds - 1))
    return Comparison(float(differences.mean()), error, seeds)


@lru_cache(maxsize=8)
def _drawn(seeds: int, groups: int, draws: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each seed and each group is in each draw; the same for all comparisons of a table."""
    random = np.random.default_rng(0)
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    return of_seeds, random.multinomial(groups, np.full(groups, 1 / groups), draws)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The t interval of the mean over the seeds.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    seeds = np.asarray(values)
    error = float(seeds.std(ddof=1)) / math.sqrt(len(seeds))
    half = float(t.ppf((1 + level) / 2, len(seeds) - 1)) * error
    return float(seeds.mean()) - half, float(seeds.mean()) + half


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm, 1979), in the same order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected
