"""The CPU's cost model: how its times grow, and the speed that they are counted from."""

from __future__ import annotations

import pytest

from inilora_kernels.kernels.cpu import cost_model
from inilora_kernels.kernels.cpu.cost_model import (
    CALLS_SECONDS,
    Machine,
    adam_seconds,
    full_svd_seconds,
    krylov_seconds,
    reading_seconds,
    this_machine,
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


def test_the_machine_is_measured_once() -> None:
    assert 1e8 < this_machine().flops < 1e15
    assert 1e7 < this_machine().alone <= this_machine().together < 1e12
    assert this_machine() is this_machine()


def test_processes_share_a_machine() -> None:
    assert Machine(8.0, 4.0, 5.0, 8).shared_by(4) == Machine(2.0, 4.0, 5.0, 2)
    assert Machine(8.0, 4.0, 5.0, 1).shared_by(4).threads == 1


def test_reading_is_shared_by_the_threads_but_for_the_largest() -> None:
    machine = Machine(1.0, alone=10.0, together=20.0, threads=4)
    assert reading_seconds([], machine) == 0.0
    assert reading_seconds([40] * 4, machine) == pytest.approx(4.0)
    assert reading_seconds([40] * 16, machine) == pytest.approx(8.0)
    assert reading_seconds([400, 1, 1], machine) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("seconds", "machine", "expected"),
    [
        (1e-4, "x86_64", (2.6e9, 2.6e9)),
        # No instructions for it: several at a time in x86's vectors, or as slow as it is.
        (1e-3, "x86_64", (2.6e8, 2e9)),
        (1e-3, "riscv64", (2.6e8, 2.6e8)),
    ],
)
def test_the_hash_is_as_fast_as_the_processor_has_it(
    seconds: float, machine: str, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(seconds * tick for tick in range(99))
    monkeypatch.setattr(cost_model.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(cost_model.platform, "machine", lambda: machine)
    assert cost_model._speeds_of_hashing() == pytest.approx(expected, rel=0.02)
