"""A study's tables: every system against one, at its own best learning rate and at one rate for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ..harness import markdown
from .comparison import Comparison, compare, holm
from .rows import Row
from .run import Run
from .table import Cell, Table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """What an example's outcome (evaluation.py, language.py) is worth, and how its mean is shown."""

    of: Callable[[Array], Array]
    factor: float
    digits: int


MEASURES = {
    "accuracy": Measure(lambda outcomes: (outcomes > 0).astype(float), 100, 1),
    "cross-entropy": Measure(lambda outcomes: np.logaddexp(0, -outcomes), 1, 3),
    "squared error": Measure(np.square, 1, 3),
    "answer loss": Measure(lambda outcomes: outcomes, 1, 3),
}


def is_study(table: Table) -> bool:
    return "measures" in table.show


def study_lines(table: Table, cells: Sequence[Cell], rows: Mapping[Run, Row]) -> list[str]:
    """Two Markdown tables: at each system's best rate, and at the common one; the first measure decides."""
    final = [cell for cell in cells if not cell.sweep and cell.run in rows]
    lines: list[str] = []
    places = [("At each method's best learning rate:", [cell for cell in final if not cell.common])]
    if table.common_rate:
        places.append((f"All at {table.common_rate:g}:", [cell for cell in final if cell.common]))
    for title, chosen in places:
        if chosen:
            lines += [title, "", *_table(table, chosen, rows), ""]
    missing = [system for system in table.systems if system not in {cell.system for cell in final}]
    if missing:
        lines += [f"Not finished at its best rate nor at the common one: {', '.join(missing)}."]
    return lines


def outcomes(cells: Sequence[Cell], rows: Mapping[Run, Row]) -> dict[str, dict[int, Array]]:
    """system → seed → the outcome of each test example."""
    found: dict[str, dict[int, Array]] = {}
    for cell in cells:
        found.setdefault(cell.system, {})[cell.run.seed] = np.array(rows[cell.run]["per_example"])
    return found


def compare_systems(
    table: Table, measure: Measure, found: Mapping[str, Mapping[int, Array]], groups: Sequence[int] | None
) -> dict[str, Comparison]:
    """Each system against the table's one, over the seeds that both have; none with fewer than two."""
    theirs = found.get(table.show["against"], {})
    compared = {}
    for system, ours in found.items():
        seeds = sorted(ours.keys() & theirs.keys())
        if system != table.show["against"] and len(seeds) > 1:
            pair = [measure.of(np.stack([one[seed] for seed in seeds])) for one in (ours, theirs)]
            compared[system] = compare(pair[0], pair[1], groups)
    return compared


def _table(table: Table, chosen: Sequence[Cell], rows: Mapping[Run, Row]) -> list[str]:
    against, names = table.show["against"], table.show["measures"]
    found = outcomes(chosen, rows)
    groups = rows[chosen[0].run].get("groups")
    compared = {name: compare_systems(table, MEASURES[name], found, groups) for name in names}
    first = compared[names[0]]
    corrected = dict(zip(first, holm([one.p for one in first.values()]), strict=True))
    header = ["method", "learning rate", "seeds"]
    for name in names:
        header += [name, f"− {against} [95 %]"]
    header += ["p (Holm)", f"within ±{_shown(table.margin or 0, MEASURES[names[0]]).lstrip('+')}"]
    others = list(table.show.get("others", ()))
    lines = []
    for system in table.systems:
        if system not in found:
            continue
        (rate,) = {cell.run.lr for cell in chosen if cell.system == system}
        line = [system, f"{rate:g}", str(len(found[system]))]
        for name in names:
            measure = MEASURES[name]
            mean = fmean(float(measure.of(one).mean()) for one in found[system].values())
            line.append(f"{measure.factor * mean:.{measure.digits}f}")
            line.append(_difference(compared[name].get(system), measure))
        if system in first:
            one = first[system]
            p = one.equivalence(table.margin or 0)
            line += [f"{one.p:.2g} ({corrected[system]:.2g})", f"{'yes' if p < 0.05 else 'not shown'} (p {p:.2g})"]
        else:
            line += ["", ""]
        for other in others:
            values = [_other(rows[cell.run], other) for cell in chosen if cell.system == system]
            line.append(f"{fmean(values):.3f}")
        lines.append(line)
    return markdown([*header, *others], lines)


def _other(row: Row, name: str) -> float:
    """A score of the test part, or the validation loss."""
    return float(row["metrics"]["validation"]["loss"] if name == "validation loss" else row["scores"][name])


def _difference(one: Comparison | None, measure: Measure) -> str:
    if one is None:
        return ""
    low, high = one.interval()
    return f"{_shown(one.difference, measure)} [{_shown(low, measure)}, {_shown(high, measure)}]"


def _shown(value: float, measure: Measure) -> str:
    """
    >>> _shown(0.0123, MEASURES["accuracy"])
    '+1.2'
    """
    return f"{measure.factor * value:+.{measure.digits}f}"
