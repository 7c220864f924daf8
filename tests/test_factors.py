"""The certificate where there is nothing to divide by."""

from __future__ import annotations

import pytest

from inilora_kernels import Certificate


def test_excess_where_the_optimum_is_zero() -> None:
    floor = 2.0**-48
    assert Certificate(loss=0.0, optimum=0.0, energy=0.0, steps=0).excess == 0.0
    assert Certificate(loss=4 * floor, optimum=0.0, energy=1.0, steps=0).excess == pytest.approx(4.0)
    assert Certificate(loss=1.0, optimum=0.0, energy=0.0, steps=0).excess == float("inf")
