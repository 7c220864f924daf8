"""What a run says while it works, with a clock of the test's own."""

from __future__ import annotations

import logging

import pytest

from inilora_kernels.display.progress import ProgressBar


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(clock: Clock, minutes: int) -> ProgressBar:
    """Reading and then solving, a step of work every second."""
    bar = ProgressBar(True, clock)
    with bar:
        bar.expect("reading", 10, 10.0, 10)
        bar.expect("solving", 60 * minutes, 60.0 * minutes, 7)
        bar.phase("reading", 10, 10)
        for _ in range(10):
            clock.now += 1
            bar.advance(1, matrices=1)
        bar.note("3 of 10 matrices found in the cache")
        bar.phase("solving", 7, 60 * minutes)
        for second in range(60 * minutes):
            clock.now += 1
            bar.advance(1, excess=1 / (second + 1), unit="steps")
    return bar


def test_without_a_terminal_lines_come_from_the_start_at_a_calm_pace(capsys: pytest.CaptureFixture[str]) -> None:
    run(Clock(), minutes=60)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "inilora: reading 10 matrices"
    assert "inilora: 3 of 10 matrices found in the cache" in lines
    assert 15 < len(lines) < 60
    assert all("of 7 matrices" in line and "min left, 1 steps/s, excess" in line for line in lines[5:-4])
    assert lines[-1] == "inilora: finished in 60 min"


def test_time_left_covers_every_stage() -> None:
    clock = Clock()
    bar = ProgressBar(False, clock)
    bar.expect("reading", 10, 10.0, 10)
    bar.expect("solving", 100, 90.0, 10)
    bar.phase("reading", 10, 10)
    clock.now = 60.0
    bar.advance(1, matrices=1)
    assert bar.left == "about 2 min left"  # predicted: the minute was start-up
    clock.now = 5.0
    bar.advance(4, matrices=4)
    assert bar.fraction == pytest.approx(0.05)
    assert bar.left == "about 2 min left"


def test_stages_that_nobody_announced_end_at_one() -> None:
    bar = ProgressBar(False)
    for name in ("reading", "certifying", "solving"):
        bar.phase(name, 1, 1)
        bar.advance(1, matrices=1)
    assert bar.fraction == pytest.approx(1.0)


def test_a_program_hears_of_it_through_logging_and_standard_error_stays_quiet(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="inilora_kernels"):
        run(Clock(), minutes=1)
    assert "solving 7 matrices" in caplog.messages
    assert capsys.readouterr().err == ""


def test_not_shown_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressBar(False, clock) as bar:
        bar.phase("solving", 1, 1)
        clock.now = 1000.0
        bar.advance(1, matrices=1)
    assert capsys.readouterr().err == ""
