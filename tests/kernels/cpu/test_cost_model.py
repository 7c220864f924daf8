"""The CPU's cost model: how its times grow, and the speed that they are counted from."""

from __future__ import annotations

import pytest

from inilora_kernels.kernels.cpu.cost_model import (
    CALLS_SECONDS,
    adam_seconds,
    full_svd_seconds,
    krylov_seconds,
    reading_seconds,
    speed_of_torch_mm,
)

SPEED = 1e11


def test_adam_grows_with_steps_rank_and_entries() -> None:
    one = adam_seconds((512, 768), 8, 100, SPEED)
    assert adam_seconds((512, 768), 8, 300, SPEED) == pytest.approx(3 * one)
    assert adam_seconds((512, 768), 16, 100, SPEED) == pytest.approx(2 * one)
    assert adam_seconds((1024, 768), 8, 100, SPEED) == pytest.approx(2 * one)
    assert adam_seconds((512, 768), 8, 100, 2 * SPEED) == pytest.approx(one / 2)


def test_krylov_never_multiplies_more_vectors_than_the_matrix_has() -> None:
    """At full rank the space is all of W's: the time stops growing with the rank."""
    assert krylov_seconds((64, 4096), 64, SPEED) == krylov_seconds((64, 4096), 8, SPEED)
    assert krylov_seconds((4096, 4096), 64, SPEED) > krylov_seconds((4096, 4096), 8, SPEED)
    assert krylov_seconds((1, 1), 1, SPEED) == pytest.approx(CALLS_SECONDS)


def test_a_transposed_matrix_costs_the_same() -> None:
    assert krylov_seconds((300, 900), 8, SPEED) == krylov_seconds((900, 300), 8, SPEED)
    assert full_svd_seconds((300, 900), 8, SPEED) == full_svd_seconds((900, 300), 8, SPEED)


def test_reading_grows_with_the_bytes() -> None:
    assert reading_seconds(2_000) == pytest.approx(2 * reading_seconds(1_000))


def test_the_speed_is_measured_once() -> None:
    assert 1e8 < speed_of_torch_mm() < 1e15
    assert speed_of_torch_mm() == speed_of_torch_mm()
