"""What a run shows while it works: one bar on a terminal, occasional lines elsewhere, and a log.

Every line also goes to the logger `inilora_kernels` at level INFO, which is quiet unless a program listens:

    logging.basicConfig(level=logging.INFO)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .sentences import duration_in_words

logger = logging.getLogger("inilora_kernels")

# Seconds between two lines without a terminal: more in a long run, so that a night fits on a screen or two.
FIRST_LINE = 5.0
SLOWER = 1.3
LAST_LINE = 300.0
# Until this share of the run is done, the time left is the predicted one: the time so far was mostly start-up.
TOO_EARLY = 0.05


@dataclass
class Stage:
    """A part of the run.

    weight: its predicted seconds. units, done: of work, in total and so far. matrices, finished: the same for matrices.
    """

    weight: float
    units: int
    matrices: int = 0
    done: int = 0
    finished: int = 0


class ProgressBar:
    """One bar over all stages of a run, on standard error; lines instead if that is not a terminal.

    Use as a context manager. `expect` announces the stages, so that the bar and the time left cover the whole run;
    `phase` begins one, `advance` moves it on, `note` prints a line.

    shown: False leaves the run to the logger alone.
    clock: returns seconds; for tests.
    """

    def __init__(self, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True, markup=False)
        self._drawn = shown and (self._console.is_terminal or self._console.is_jupyter)
        self._written = shown and not self._drawn
        self._clock = clock
        self._started = self._last_line = clock()
        self._pace = FIRST_LINE
        self._stages: dict[str, Stage] = {}
        self._name = ""
        self._said: set[str] = set()
        self._announced = False
        self._excess: float | None = None
        self._speed = ""
        self._speed_since = (self._started, 0)
        self._progress = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rest]}"),
            console=self._console,
            disable=not self._drawn,
            transient=False,
        )
        self._task = self._progress.add_task("", total=1.0, text="", rest="")

    def __enter__(self) -> ProgressBar:
        if self._drawn:  # where it is not, rich 13.0 prints an empty line in the end
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._stages:
            took = duration_in_words(self._clock() - self._started)
            self._progress.update(self._task, completed=1.0, text="finished", rest=f"in {took}")
            self._line(f"finished in {took}")
        if self._drawn:
            self._progress.stop()

    def expect(self, name: str, units: int, seconds: float, matrices: int) -> None:
        """Announce a stage: its units of work, its predicted seconds, its matrices. A second call corrects them."""
        self._announced = True
        self._add(name, units, seconds, matrices)

    def _add(self, name: str, units: int, seconds: float, matrices: int) -> None:
        before = self._stages.get(name, Stage(0.0, 0))
        weight = max(seconds, 1e-6)
        self._stages[name] = Stage(weight, units, matrices, done=before.done, finished=before.finished)

    def phase(self, name: str, matrices: int, units: int) -> None:
        """Begin a stage, or its next batch, with the batch's matrices and units of work; only the stage gets a line."""
        if name not in self._stages:
            # Not announced: it counts as much as all the announced ones.
            self._add(name, units, sum(stage.weight for stage in self._stages.values()) or 1.0, matrices)
        self._name, self._excess, self._speed = name, None, ""
        self._speed_since = (self._clock(), 0)
        self._show()
        if name not in self._said:
            self._said.add(name)
            total = self._stages[name].matrices
            self._line(f"{name} {total} {'matrix' if total == 1 else 'matrices'}")

    def advance(self, units: int, *, matrices: int = 0, excess: float | None = None, unit: str = "") -> None:
        """Move on by units of work and finished matrices; show the excess and, if the unit has a name, the speed."""
        if not self._name:
            return
        stage = self._stages[self._name]
        stage.done = min(stage.units, stage.done + units)
        stage.finished += matrices
        self._excess = self._excess if excess is None else excess
        if unit:
            since, before = self._speed_since
            self._speed_since = (since, before + units)
            if (passed := self._clock() - since) > 0:
                self._speed = f"{(before + units) / passed:,.0f} {unit}/s"
        self._show()
        if self._clock() - self._last_line >= self._pace:
            self._pace = min(LAST_LINE, SLOWER * self._pace)
            self._line(f"{self._name}: {stage.finished} of {stage.matrices} matrices, {self._state()}")

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._drawn:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        self._line(text)

    @property
    def fraction(self) -> float:
        """The share of the run that is done, by predicted seconds."""
        weight = sum(stage.weight for stage in self._stages.values())
        done = sum(stage.weight * stage.done / stage.units for stage in self._stages.values() if stage.units)
        return done / weight if weight else 0.0

    @property
    def left(self) -> str:
        """The time left: at first as predicted, then from the time taken; "" if neither is known."""
        fraction, passed = self.fraction, self._clock() - self._started
        if fraction >= TOO_EARLY:
            return _left(passed * (1 - fraction) / fraction) if passed > 0 else ""
        predicted = sum(stage.weight for stage in self._stages.values()) * (1 - fraction)
        return _left(predicted) if self._announced else ""

    def _state(self) -> str:
        excess = "" if self._excess is None else f"excess {self._excess:.1e}"
        return ", ".join(part for part in (f"{self.fraction:.0%}", self.left, self._speed, excess) if part)

    def _show(self) -> None:
        if self._drawn:
            excess = "" if self._excess is None else f"excess {self._excess:.1e}"
            self._progress.update(
                self._task,
                completed=self.fraction,
                text=f"{self._name} {self._stages[self._name].finished}/{self._stages[self._name].matrices}",
                rest="  ".join(part for part in (self.left, self._speed, excess) if part),
            )

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        logger.info(text)
        if self._written and not logger.isEnabledFor(logging.INFO):
            print(f"inilora: {text}", file=sys.stderr, flush=True)


def _left(seconds: float) -> str:
    return f"{'about ' if seconds >= 1 else ''}{duration_in_words(seconds)} left"
