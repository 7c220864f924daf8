"""A study's tables: every system against one, at its own best learning rate and at one rate for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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


def _per_example(row: Row) -> Array:
    return np.array(row["per_example"])


@dataclass(frozen=True)
class Measure:
    """What each test example of a row (evaluation.py, language.py) is worth, and how the mean is shown.

    groups: the examples' groups, where they have any.
    """

    of: Callable[[Row], Array]
    factor: float
    digits: int
    groups: Callable[[Row], Sequence[Hashable] | None] = lambda row: row.get("groups")


MEASURES = {
    "accuracy": Measure(lambda row: (_per_example(row) > 0).astype(float), 100, 1),
    "cross-entropy": Measure(lambda row: np.logaddexp(0, -_per_example(row)), 1, 3),
    "squared error": Measure(lambda row: np.square(_per_example(row)), 1, 3),
    "answer loss": Measure(_per_example, 1, 3),
    "exact match": Measure(
        lambda row: np.array([float(found == expected) for _, found, expected in row["answers"]]),
        100,
        1,
        lambda row: [template for template, _, _ in row["answers"]],
    ),
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


def worth(measure: Measure, cells: Sequence[Cell], rows: Mapping[Run, Row]) -> dict[str, dict[int, Array]]:
    """system → seed → what each test example is worth."""
    found: dict[str, dict[int, Array]] = {}
    for cell in cells:
        found.setdefault(cell.system, {})[cell.run.seed] = measure.of(rows[cell.run])
    return found


def compare_systems(
    against: str, found: Mapping[str, Mapping[int, Array]], groups: Sequence[Hashable] | None
) -> dict[str, Comparison]:
    """Each system against one, over the seeds that both have; none with fewer than two."""
    theirs = found.get(against, {})
    compared = {}
    for system, ours in found.items():
        seeds = sorted(ours.keys() & theirs.keys())
        if system != against and len(seeds) > 1:
            pair = [np.stack([one[seed] for seed in seeds]) for one in (ours, theirs)]
            compared[system] = compare(pair[0], pair[1], groups)
    return compared


def _table(table: Table, chosen: Sequence[Cell], rows: Mapping[Run, Row]) -> list[str]:
    against, names = table.show["against"], table.show["measures"]
    found = {name: worth(MEASURES[name], chosen, rows) for name in names}
    groups = {name: MEASURES[name].groups(rows[chosen[0].run]) for name in names}
    compared = {name: compare_systems(against, found[name], groups[name]) for name in names}
    first = compared[names[0]]
    corrected = dict(zip(first, holm([one.p for one in first.values()]), strict=True))
    header = ["method", "learning rate", "seeds"]
    for name in names:
        header += [name, f"− {against} [95 %]"]
    header += ["p (Holm)", f"within ±{_shown(table.margin or 0, MEASURES[names[0]]).lstrip('+')}"]
    others = list(table.show.get("others", ()))
    lines = []
    for system in table.systems:
        if system not in found[names[0]]:
            continue
        (rate,) = {cell.run.lr for cell in chosen if cell.system == system}
        line = [system, f"{rate:g}", str(len(found[names[0]][system]))]
        for name in names:
            measure = MEASURES[name]
            mean = fmean(float(one.mean()) for one in found[name][system].values())
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
