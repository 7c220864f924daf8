"""What a search has to prove, on Ritz pairs whose truth is known."""

from __future__ import annotations

import numpy as np

from inilora_kernels.factors import FLOAT32_FLOOR
from inilora_kernels.kernels.cpu.judgement import allowed
from inilora_kernels.solvers.goal import Goal
from inilora_kernels.solvers.ritz import RitzPairs


def pairs(values: list[float], residual: float) -> RitzPairs:
    theta = np.array(values)
    return RitzPairs(theta, np.full((len(theta), 1), residual), np.diag(theta))


def goal(tolerance: float = 1e-8, unit: float = 2.0**-52) -> Goal:
    return Goal(energy=20.0, ranks=(1, 2), tolerance=tolerance, unit=unit, exact=False)


def test_small_residuals_settle_it_and_large_ones_do_not() -> None:
    assert goal().settled(pairs([9.0, 5.0, 1.0, 0.9], 1e-6), missed=1.5) == (True, True)
    assert goal().settled(pairs([9.0, 5.0, 1.0, 0.9], 1e-3), missed=1.5) == (False, False)
    # Nothing is proven while as much as θ_2 may lie outside.
    assert goal().settled(pairs([9.0, 5.0, 1.0, 0.9], 1e-6), missed=5.5) == (False, False)


def test_the_rank_furthest_from_its_tolerance_decides() -> None:
    found = pairs([9.0, 5.0, 1.0, 0.9], 1e-4)
    alone = [Goal(20.0, (rank,), 1e-8, 2.0**-52, exact=False).promised(found, 1.5) for rank in (1, 2)]
    assert goal().promised(found, 1.5) == max(alone)


def test_rounding_beyond_the_tolerance_asks_for_float64() -> None:
    found = pairs([9.0, 5.0, 1.0, 0.9], 1e-6)
    assert goal(unit=2.0**-10).too_coarse(found)
    assert not goal(unit=2.0**-23).too_coarse(found)
    assert not Goal(20.0, (1, 2), 1e-8, 2.0**-10, exact=True).too_coarse(found)


def test_what_float32_factors_cannot_show_is_allowed() -> None:
    theta = pairs([9.0, 5.0], 0.0).theta
    assert allowed(theta, 2, goal(tolerance=0.0).numbers) == FLOAT32_FLOOR * 20.0
    assert allowed(theta, 2, goal(tolerance=0.5).numbers) == 3.0
