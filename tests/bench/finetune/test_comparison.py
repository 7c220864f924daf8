"""The statistics against other ways to the same number, and by simulation: an interval covers as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from bench.finetune.comparison import Comparison, compare


def crossed(random: np.random.Generator, seeds: int, groups: int, each: int) -> np.ndarray:
    """Differences with an effect of the seed, of the group and of both, and a mean of 0."""
    of_both = 0.5 * random.normal(size=(seeds, groups, 1)) + 0.5 * random.normal(size=(seeds, groups, each))
    effects = 0.3 * random.normal(size=(seeds, 1, 1)) + 0.6 * random.normal(size=(1, groups, 1)) + of_both
    return effects.reshape(seeds, groups * each)


@pytest.mark.parametrize(("seeds", "groups", "each"), [(5, 15, 3), (20, 60, 1)])
def test_an_interval_covers_the_truth_as_often_as_it_says(seeds: int, groups: int, each: int) -> None:
    random = np.random.default_rng(1)
    names = [group for group in range(groups) for _ in range(each)]
    covered = []
    for _ in range(400):
        differences = crossed(random, seeds, groups, each)
        low, high = compare(differences, np.zeros_like(differences), names, draws=300).interval()
        covered.append(low < 0 < high)
    # 400 trials at 0.95 have a standard deviation of 0.011; the method errs on the wide side.
    assert np.mean(covered) > 0.95 - 3 * 0.011


def test_groups_that_are_ignored_make_an_interval_too_narrow() -> None:
    random = np.random.default_rng(2)
    differences = crossed(random, 20, 8, 20)
    names = [group for group in range(8) for _ in range(20)]
    zeros = np.zeros_like(differences)
    assert compare(differences, zeros, names).error > 1.5 * compare(differences, zeros).error


def test_where_only_seeds_differ_it_is_the_paired_t_test() -> None:
    of_seeds = np.array([0.3, 0.1, 0.5, 0.2, 0.4, 0.2])
    differences = np.repeat(of_seeds[:, None], 50, axis=1)
    found = compare(differences, np.zeros_like(differences), draws=200_000)
    exact = of_seeds.std(ddof=1) / np.sqrt(6)
    # A bootstrap of 200,000 draws knows a standard deviation to 1/√(2 · 200,000), 0.2 %.
    assert found.error == pytest.approx(exact, rel=0.01)
    exactly = Comparison(found.difference, exact, 6)
    assert exactly.p == pytest.approx(ttest_1samp(of_seeds, 0).pvalue)
    sides = [ttest_1samp(of_seeds, -0.5, alternative="greater"), ttest_1samp(of_seeds, 0.5, alternative="less")]
    assert exactly.equivalence(0.5) == pytest.approx(max(side.pvalue for side in sides))
    low, high = exactly.interval()
    assert (low, high) == pytest.approx(tuple(ttest_1samp(of_seeds, 0).confidence_interval(0.95)))


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    for difference in (-0.004, 0.0, 0.006, 0.02):
        found = Comparison(difference, 0.003, 20)
        low, high = found.interval(0.9)
        assert (found.equivalence(0.01) < 0.05) == (max(-low, high) < 0.01)


def test_one_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        compare(np.zeros((1, 3)), np.zeros((1, 3)))
