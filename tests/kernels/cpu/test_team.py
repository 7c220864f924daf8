"""Threads that share a job: every part of every round is done once, and no round begins before the last one ends."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from inilora_kernels.kernels.cpu.jit import njit
from inilora_kernels.kernels.cpu.team import (
    close,
    job,
    open_round,
    part_done,
    take_part,
    wait_for_part,
    wait_until_done,
)
from inilora_kernels.kernels.threads import helped


@njit(nogil=True)
def own(shared: Any, rounds: int, parts: int, round_of: Any, begun: Any) -> None:
    for number in range(rounds):
        begun[0] = number
        open_round(shared, parts)
        while True:
            part = take_part(shared)
            if part < 0:
                break
            round_of[part] += begun[0] + 1
            part_done(shared)
        wait_until_done(shared)
    close(shared)


@njit(nogil=True)
def help_out(shared: Any, round_of: Any, begun: Any) -> None:
    while True:
        part = wait_for_part(shared)
        if part < 0:
            return
        round_of[part] += begun[0] + 1
        part_done(shared)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_each_part_is_done_once_in_its_round(helpers: int, parts: int) -> None:
    rounds = 2000
    shared, begun = job(), np.zeros(1, np.int64)
    round_of = np.zeros(rounds * parts, np.int64)
    with helped(partial(help_out, shared, round_of, begun), helpers):
        own(shared, rounds, parts, round_of, begun)
    assert round_of.tolist() == np.repeat(np.arange(1, rounds + 1), parts).tolist()


def test_a_helper_that_comes_late_finds_the_job_closed() -> None:
    shared = job()
    close(shared)
    assert wait_for_part(shared) == -1
    assert take_part(shared) == -1
