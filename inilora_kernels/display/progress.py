"""What a run shows while it works: matrices done, steps a second, the excess last seen, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on standard error for each phase of a run; with shown=False, nothing at all.

    Use as a context manager; `phase` begins a phase, `advance` moves it on.
    """

    def __init__(self, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>11}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[matrices]}/{task.fields[total_matrices]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[excess]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, matrices: int, units: int) -> None:
        """Begin a phase over so many matrices, of so many units of work in all."""
        self._task = self._progress.add_task(
            name, total=units, matrices=0, total_matrices=matrices, speed="", excess=""
        )

    def advance(self, units: int, *, matrices: int = 0, excess: float | None = None, unit: str = "") -> None:
        """Move on by units of work and by finished matrices; show the excess and, for a named unit, the speed."""
        if self._task is None:
            return
        task = self._progress.tasks[self._task]
        task.fields["matrices"] += matrices
        if excess is not None:
            task.fields["excess"] = f"excess {excess:.1e}"
        self._progress.advance(self._task, units)
        if unit and task.speed:
            task.fields["speed"] = f"{task.speed:,.0f} {unit}/s"
