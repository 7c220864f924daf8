"""A table or figure: a YAML file of tables/, and the runs that it needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from .rows import Row
from .run import Run

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Cell:
    """A run and the place that a table gives it."""

    system: str
    run: Run
    sweep: bool = False


@dataclass(frozen=True)
class Table:
    """What a YAML file says.

    settings: of Run, the same for every run.
    systems: settings of each row of the table, by its label.
    grid: settings with several values; every combination is run for every system.
    variants: sets of settings that go together, the data and what is evaluated after it; each is run like the grid.
    sweep: `lr`, the learning rates, for some systems others in `lr_of`, and `seed`, the seeds to try them with. The
        rate of the best mean validation score is then run with every seed of the grid.
    rates_of: instead, the table whose sweep's best rates are used, and the system there for each system here.
    show: how it is drawn: `columns`, settings whose values are columns; `against`, the system that the others are
        tested against; `plot`, one of plots.py's, with its options.
    """

    name: str
    title: str
    source: str
    settings: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Sequence[Any]]
    show: Mapping[str, Any]
    sweep: Mapping[str, Any] | None = None
    rates_of: Mapping[str, Any] | None = None
    variants: Sequence[Mapping[str, Any]] = ({},)
    quick: bool = False

    def cells(self, rows: Mapping[Run, Row]) -> Iterator[Cell]:
        """The runs that can be named now, those of a sweep before those that need its outcome."""
        for label, system in self.systems.items():
            names = [name for name in self.grid if name != "seed"]
            for variant, *values in itertools.product(self.variants, *(self.grid[name] for name in names)):
                settings = {**self.settings, **variant, **dict(zip(names, values, strict=True)), **system}
                if self.sweep:
                    yield from (Cell(label, run, sweep=True) for run in self._sweep_runs(label, settings))
                rate = settings.get("lr") or self.best_rate(label, settings, rows)
                if rate is not None:
                    for seed in self.grid["seed"]:
                        yield Cell(label, _run({**settings, "lr": rate, "seed": seed}))

    def evaluations(self) -> set[str]:
        """The benchmarks that any of its runs is evaluated with."""
        parts = (self.settings, *self.variants, *self.systems.values())
        return {name for part in parts for name in part.get("evaluations", ())}

    def best_rate(self, label: str, settings: Mapping[str, Any], rows: Mapping[Run, Row]) -> float | None:
        """The swept learning rate of the best mean validation score; None as long as a run of the sweep is missing."""
        if self.rates_of:
            other = load(self.rates_of["table"], quick=self.quick)
            label = self.rates_of.get("systems", {}).get(label, label)
            chosen = {**other.settings, **{name: values[0] for name, values in other.grid.items() if name != "seed"}}
            return other.best_rate(label, {**chosen, **other.systems[label]}, rows)
        assert self.sweep is not None, f"{self.name}: no lr, no sweep and no rates_of"
        scores: dict[float, list[float]] = {}
        for run in self._sweep_runs(label, settings):
            if run not in rows:
                return None
            score = rows[run]["validation_score"]
            scores.setdefault(run.lr, []).append(score if math.isfinite(score) else -math.inf)
        return max(scores, key=lambda rate: fmean(scores[rate]))

    def _sweep_runs(self, label: str, settings: Mapping[str, Any]) -> list[Run]:
        assert self.sweep is not None
        rates, seeds = self.sweep.get("lr_of", {}).get(label, self.sweep["lr"]), self.sweep["seed"]
        return [_run({**settings, "lr": rate, "seed": seed}) for rate in rates for seed in seeds]


def _run(settings: Mapping[str, Any]) -> Run:
    return Run(**{**settings, "evaluations": tuple(settings.get("evaluations", ()))})


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str, quick: bool = False) -> Table:
    """Read tables/{name}.yaml; quick: with two seeds and two learning rates, four steps a run and little data."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    table = Table(name=name, **content, quick=quick)
    if not quick:
        return table
    sweep = table.sweep and {"lr": table.sweep["lr"][1:3], "seed": table.sweep["seed"][:1]}
    grid = {**table.grid, "seed": table.grid["seed"][:2]}
    settings = {**table.settings, "max_steps": 4, "train_size": 64, "evaluation_size": 64}
    return replace(table, settings=settings, sweep=sweep, grid=grid)
