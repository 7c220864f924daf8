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
    """A run and the place that a table gives it.

    sweep: it has a say in a learning rate. common: it is at the learning rate that all systems have in common.
    """

    system: str
    run: Run
    sweep: bool = False
    common: bool = False


@dataclass(frozen=True)
class Table:
    """What a YAML file says.

    settings: of Run, the same for every run.
    systems: settings of each row of the table, by its label.
    grid: settings with several values; every combination is run for every system.
    variants: sets of settings that go together, the data and what is evaluated after it; each is run like the grid.
    sweep: `lr`, the learning rates, for some systems others in `lr_of`, and `seed`, the seeds to try them with. The
        rate of the best mean validation score, or, `by: loss`, of the least mean validation loss, is then run with
        every seed of the grid. `extend`: a best rate at an end of the grid adds the next one, in steps of about √10,
        until it is bracketed. `settings`: of these runs alone.
    common_rate: a learning rate that every seed of the grid is run at too, whatever is best for a system.
    margin: differences smaller than this count as none; set before the runs.
    rates_of: instead, the table whose sweep's best rates are used, and the system there for each system here.
    show: how it is drawn: `columns`, settings whose values are columns; `against`, the system that the others are
        tested against; `average`, a last column with the mean over the tasks; `loss`, what the loss on the test part
        is called, where it has a column; `measures` and `others` of a study (study.py); `plot`, one of plots.py's,
        with its options.
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
    common_rate: float | None = None
    margin: float | None = None
    variants: Sequence[Mapping[str, Any]] = ({},)
    quick: bool = False

    def cells(self, rows: Mapping[Run, Row]) -> Iterator[Cell]:
        """The runs that can be named now, those of a sweep before those that need its outcome."""
        for label, system in self.systems.items():
            names = [name for name in self.grid if name != "seed"]
            for variant, *values in itertools.product(self.variants, *(self.grid[name] for name in names)):
                settings = {**self.settings, **variant, **dict(zip(names, values, strict=True)), **system}
                if self.sweep:
                    yield from (Cell(label, run, sweep=True) for run in self._sweep_runs(label, settings, rows))
                rate = settings.get("lr") or self.best_rate(label, settings, rows)
                if rate is not None:
                    for seed in self.grid["seed"]:
                        yield Cell(label, _run({**settings, "lr": rate, "seed": seed}))
                for seed in self.grid["seed"] if self.common_rate else ():
                    yield Cell(label, _run({**settings, "lr": self.common_rate, "seed": seed}), common=True)

    def total(self, rows: Mapping[Run, Row]) -> int:
        """Runs in all, as far as the rows can tell; before a sweep is over, another rate stands in for its best."""
        cells = list(self.cells(rows))
        chosen = {cell.system for cell in cells if not cell.sweep and not cell.common}
        rates = self.sweep["lr"] if self.sweep else [1.0]
        stand_in = next(rate for rate in rates if rate != self.common_rate)
        others = {label: {**system, "lr": stand_in} for label, system in self.systems.items() if label not in chosen}
        return len({cell.run for cell in (*cells, *replace(self, systems=others, rates_of=None).cells(rows))})

    def evaluations(self) -> list[str]:
        """The benchmarks that any of its runs is evaluated with."""
        parts = (self.settings, *self.variants, *self.systems.values())
        return sorted({name for part in parts for name in part.get("evaluations", ())})

    def best_rate(self, label: str, settings: Mapping[str, Any], rows: Mapping[Run, Row]) -> float | None:
        """The best of the swept learning rates; None as long as a run of the sweep is missing."""
        if self.rates_of:
            other = load(self.rates_of["table"], quick=self.quick)
            label = self.rates_of.get("systems", {}).get(label, label)
            chosen = {**other.settings, **{name: values[0] for name, values in other.grid.items() if name != "seed"}}
            return other.best_rate(label, {**chosen, **other.systems[label]}, rows)
        assert self.sweep is not None, f"{self.name}: no lr, no sweep and no rates_of"
        rates = self._rates(label, settings, rows)
        worth = {rate: self._worth(settings, rate, rows) for rate in rates}
        if any(value is None for value in worth.values()):
            return None
        return max(rates, key=lambda rate: -math.inf if worth[rate] is None else worth[rate])

    def _rates(self, label: str, settings: Mapping[str, Any], rows: Mapping[Run, Row]) -> list[float]:
        """The learning rates to sweep, as far as the rows can tell."""
        assert self.sweep is not None
        rates = sorted(self.sweep.get("lr_of", {}).get(label, self.sweep["lr"]))
        while self.sweep.get("extend"):
            worth = [self._worth(settings, rate, rows) for rate in rates]
            known = [value for value in worth if value is not None]
            if len(known) < len(worth) or max(known) == -math.inf:
                break
            best = known.index(max(known))
            if 0 < best < len(rates) - 1:
                break
            rates = sorted([*rates, neighbour(rates[best], up=best > 0)])
        return rates

    def _worth(self, settings: Mapping[str, Any], rate: float, rows: Mapping[Run, Row]) -> float | None:
        """The mean over the sweep's seeds, the more the better; −∞ where one diverged, None where one is missing."""
        assert self.sweep is not None
        runs = self._runs_at(settings, rate)
        if any(run not in rows for run in runs):
            return None
        if self.sweep.get("by") == "loss":
            values = [-rows[run]["metrics"]["validation"]["loss"] for run in runs]
        else:
            values = [rows[run]["validation_score"] for run in runs]
        return fmean(values) if all(math.isfinite(value) for value in values) else -math.inf

    def _runs_at(self, settings: Mapping[str, Any], rate: float) -> list[Run]:
        assert self.sweep is not None
        own = self.sweep.get("settings", {})
        return [_run({**settings, **own, "lr": rate, "seed": seed}) for seed in self.sweep["seed"]]

    def _sweep_runs(self, label: str, settings: Mapping[str, Any], rows: Mapping[Run, Row]) -> list[Run]:
        return [run for rate in self._rates(label, settings, rows) for run in self._runs_at(settings, rate)]


def neighbour(rate: float, up: bool) -> float:
    """The next rate on the grid 1, 3, 10, 30, …

    >>> neighbour(3e-3, up=True), neighbour(1e-3, up=True), neighbour(1e-3, up=False), neighbour(3e-3, up=False)
    (0.01, 0.003, 0.0003, 0.001)
    """
    digit, exponent = f"{rate:e}".split("e")
    one = digit.startswith("1")
    power = int(exponent) + (0 if one == up else 1 if up else -1 if one else 0)
    return float(f"{3 if one else 1}e{power}")


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
