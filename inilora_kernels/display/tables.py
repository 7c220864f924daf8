"""A result as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from ..factors import Factors
from .names import labels_of, places_of
from .sentences import relative, run_in_words, worth_in_words

# Tables fit a terminal of this many columns.
WIDTH = 80
# At most this many singular values are drawn as a row of bars in the terminal.
_SPARKS = 8


def result_table(factors: Mapping[str, Factors], options: Mapping[str, Any], *, every: bool = False) -> Table:
    """A row of means for each kind of matrix; with every=True, a row for each matrix.

    error: ‖W − BA‖² as a share of ‖W‖². least: f*/‖W‖², below which no BA of this rank can go. excess: f/f* − 1, the
    row's worst.
    """
    shared, rows = _rows(list(factors), every)
    result = Table(
        title=f"{run_in_words(factors, options)}\n{shared}",
        caption=f"{worth_in_words(factors)}{_steps_in_words(factors)}",
        show_footer=True,
        min_width=WIDTH,
    )
    totals = list(factors.values())
    result.add_column("matrix" if every else "kind", "all", overflow="fold", ratio=1)
    if not every:
        result.add_column("count", str(len(totals)), justify="right", no_wrap=True)
    result.add_column("out×in", justify="right", no_wrap=True)
    result.add_column("rank", justify="right", no_wrap=True)
    for name, cell in zip(("error", "least", "excess"), _worth(totals), strict=True):
        result.add_column(name, cell, justify="right", no_wrap=True)
    for label, names in rows.items():
        mine = [factors[name] for name in names]
        count = [] if every else [str(len(mine))]
        result.add_row(label, *count, _one_or_range(_shape(one) for one in mine), _ranks(mine), *_worth(mine))
    return result


def spectrum_table(factors: Mapping[str, Factors], *, every: bool = False) -> Table | None:
    """Singular values, and the energy that the best approximation of each rank keeps: the median of each kind.

    every: a row for each matrix. None if the file holds no singular values.
    """
    known = {name: one for name, one in factors.items() if one.singular_values}
    if not known:
        return None
    most = max(len(one.singular_values) for one in known.values())
    ranks = [rank for rank in (1, 4, 8, 16, 32, 64) if rank <= most]
    result = Table(title="Singular values σ, and the energy ‖W‖² that a rank can keep", min_width=WIDTH)
    result.add_column("matrix" if every else "kind, median", overflow="fold", ratio=1)
    result.add_column("σ₁, …", no_wrap=True)
    for name in ("σ₁", "σ at r", "next"):
        result.add_column(name, justify="right", no_wrap=True)
    for rank in ranks[:4]:
        result.add_column(f"r={rank}", justify="right", no_wrap=True)
    for label, names in _rows(list(known), every)[1].items():
        mine = [known[name] for name in names]
        everywhere = min(len(one.singular_values) for one in mine)
        result.add_row(
            label,
            _sparkline([statistics.median(column) for column in _columns(mine, min(everywhere, _SPARKS))]),
            *(_value_at(mine, place) for place in ("first", "rank", "next")),
            *(
                _median([_share_kept(one, rank) for one in mine], ".0%") if rank <= everywhere else ""
                for rank in ranks[:4]
            ),
        )
    return result


def _rows(names: Sequence[str], every: bool) -> tuple[str, dict[str, list[str]]]:
    """The line under the title, and each row's modules by its label."""
    labels, pattern = labels_of(names)
    if every:
        return pattern, {label: [name] for label, name in zip(labels, names, strict=True)}
    rows: dict[str, list[str]] = {}
    for name, place in zip(names, places_of(names), strict=True):
        rows.setdefault(place.kind, []).append(name)
    return pattern, rows


def _worth(factors: Sequence[Factors]) -> tuple[str, str, str]:
    """Error and least over all of them, and the worst excess."""
    certificates = [one.certificate for one in factors]
    energy = math.fsum(certificate.energy for certificate in certificates) or 1.0
    error = math.fsum(certificate.loss for certificate in certificates) / energy
    least = math.fsum(certificate.optimum for certificate in certificates) / energy
    if math.isnan(energy):
        return "?", "?", "?"
    worst = max(certificate.excess for certificate in certificates)
    return (
        relative(error),
        relative(least),
        f"{'' if len(factors) == 1 else '≤ '}{worst:.{'1e' if worst < 1 else '3g'}}",
    )


def _steps_in_words(factors: Mapping[str, Factors]) -> str:
    steps = sorted({one.certificate.steps for one in factors.values()})
    if steps[-1] == 0:
        return ""
    return f"; {steps[0]:,}{f' to {steps[-1]:,}' if len(steps) > 1 else ''} Adam steps"


def _shape(one: Factors) -> str:
    return f"{one.B.shape[0]}×{one.A.shape[1]}"


def _ranks(factors: Sequence[Factors]) -> str:
    ranks = sorted({one.rank for one in factors})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def _one_or_range(cells: Iterable[str]) -> str:
    different = dict.fromkeys(cells)
    return next(iter(different)) if len(different) == 1 else f"{len(different)} shapes"


def _columns(factors: Sequence[Factors], count: int) -> list[list[float]]:
    return [[one.singular_values[place] for one in factors] for place in range(count)]


def _value_at(factors: Sequence[Factors], mark: str) -> str:
    """The median singular value at an index, if every matrix has one there."""
    places = [{"first": 0, "rank": one.rank - 1, "next": one.rank}[mark] for one in factors]
    known = all(place < len(one.singular_values) for place, one in zip(places, factors, strict=True))
    return _median([one.singular_values[i] for i, one in zip(places, factors, strict=True)], ".3g") if known else ""


def _share_kept(one: Factors, rank: int) -> float:
    energy = one.certificate.energy
    return math.fsum(value**2 for value in one.singular_values[:rank]) / energy if energy else 1.0


def _median(values: Sequence[float], form: str) -> str:
    return format(statistics.median(values), form) if values else ""


def _sparkline(values: Sequence[float]) -> str:
    """Heights in eighths of the first value.

    >>> _sparkline([8.0, 4.0, 1.0])
    '█▄▁'
    """
    highest = values[0] or 1.0
    return "".join("▁▂▃▄▅▆▇█"[max(0, min(7, math.ceil(8 * value / highest) - 1))] for value in values)


def truncation_table(errors: Mapping[str, float], rank: int, *, every: bool = False) -> Table:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of updates recompressed to a rank: the worst of each kind, or all with every=True."""
    shared, rows = _rows(list(errors), every)
    title = f"{len(errors)} updates recompressed to rank {rank}\n{shared}"
    result = Table(title=title, show_footer=True, min_width=WIDTH)
    result.add_column("module" if every else "kind, worst", "worst", overflow="fold", ratio=1)
    result.add_column("‖ΔW − ΔW'‖ / ‖ΔW‖", f"{max(errors.values()):.2%}", justify="right", no_wrap=True)
    for label, names in rows.items():
        result.add_row(label, f"{max(errors[name] for name in names):.2%}")
    return result
