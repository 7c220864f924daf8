"""A table from its rows: mean ± standard deviation over the seeds, and a paired test against one system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table as RichTable
from scipy.stats import ttest_rel

from inilora_kernels.storage.atomic import write_whole

from ..harness import markdown
from .comparison import holm
from .plots import draw
from .rows import Row
from .run import Run
from .study import is_study, study_lines
from .table import Cell, Table

Column = tuple[str, ...]


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test over seeds, two-sided. difference: the mean of ours − theirs; seeds: pairs."""

    difference: float
    p: float
    seeds: int


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest | None:
    """By seed; None for fewer than two common seeds.

    >>> paired_test({0: 0.8, 11: 0.9, 22: 0.8}, {0: 0.7, 11: 0.7, 22: 0.7}).seeds
    3
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if max(differences) == min(differences):
        return PairedTest(fmean(differences), 1.0 if differences[0] == 0 else 0.0, len(seeds))
    p = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]).pvalue
    return PairedTest(fmean(differences), float(p), len(seeds))


def scores_by_seed(
    table: Table, cells: Sequence[Cell], rows: Mapping[Run, Row]
) -> dict[str, dict[Column, dict[int, float]]]:
    """system → column → seed → score, of the runs that have a row; diverged ones count as what they scored: NaN."""
    found: dict[str, dict[Column, dict[int, float]]] = {}
    for cell in cells:
        if cell.sweep or cell.run not in rows:
            continue
        for score, value in rows[cell.run]["scores"].items():
            if score == "loss":
                if "loss" not in table.show:
                    continue
                score = table.show["loss"]
            column = (*(f"{name} {getattr(cell.run, name)}" for name in table.show.get("columns", ())), score)
            found.setdefault(cell.system, {}).setdefault(column, {})[cell.run.seed] = value
    if table.show.get("average"):
        firsts = _first_scores(table, cells, rows)
        for system, of_seeds in firsts.items():
            tasks = len({cell.run.task for cell in cells})
            whole = {seed: fmean(scores) for seed, scores in of_seeds.items() if len(scores) == tasks}
            if whole:
                found[system][("Avg",)] = whole
    return found


def _first_scores(table: Table, cells: Sequence[Cell], rows: Mapping[Run, Row]) -> dict[str, dict[int, list[float]]]:
    """system → seed → each task's first score."""
    found: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        if not cell.sweep and cell.run in rows:
            score = next(iter(rows[cell.run]["scores"].values()))
            found.setdefault(cell.system, {}).setdefault(cell.run.seed, []).append(score)
    return found


def write_report(
    table: Table, rows: Mapping[Run, Row], results: Path, console: Console, document: Path | None = None
) -> None:
    """The table to the terminal and to {table}.md, the plot to {table}.png; nothing where there are no rows yet.

    document: a Markdown file that shows the table too, between `<!-- {table} -->` and `<!-- end -->`.
    """
    cells = list(table.cells(rows))
    scores = scores_by_seed(table, cells, rows)
    if not any(cell.run in rows and not cell.sweep for cell in cells):
        console.print(f"{table.name}: no rows yet")
        return
    if not scores:
        # A figure of training losses has no scores to tabulate.
        draw(table, cells, rows, results / f"{table.name}.png")
        return
    if is_study(table):
        body = study_lines(table, cells, rows)
        console.print("\n".join(body))
    else:
        header, lines = tabulate(table, cells, scores, rows)
        shown = RichTable(*header, title=table.title)
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
        body = markdown(header, lines)
    body = [*body, *sweep_lines(table, cells, rows)]
    done = {cell.run for cell in cells if cell.run in rows}
    commits = sorted({rows[run]["machine"]["commit"] for run in done})
    commands = sorted({rows[run]["command"] for run in done})
    content = [
        f"# {table.title}",
        "",
        table.source.strip(),
        "",
        *body,
        "",
        f"{len(done)}{f' of {table.total(rows)}' if is_study(table) else ''} rows, at commit {', '.join(commits)}, by:",
        "",
        *(f"    {command}" for command in commands),
        "",
    ]
    write_whole(results / f"{table.name}.md", "\n".join(content).encode())
    draw(table, cells, rows, results / f"{table.name}.png")
    if document is not None:
        text = document.read_text(encoding="utf-8")
        write_whole(document, put_table(text, table.name, content[4:]).encode())


def sweep_lines(table: Table, cells: Sequence[Cell], rows: Mapping[Run, Row]) -> list[str]:
    """A Markdown table of what the learning rates were chosen by, the best in bold; nothing without a sweep."""
    if table.sweep is None:
        return []
    by_loss = table.sweep.get("by") == "loss"
    values: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        if cell.sweep and cell.run in rows:
            row = rows[cell.run]
            value = row["metrics"]["validation"]["loss"] if by_loss else 100 * row["validation_score"]
            values.setdefault(cell.system, {}).setdefault(cell.run.lr, []).append(value)
    rates = sorted({rate for line in values.values() for rate in line})
    lines = []
    for system, line in values.items():
        means = {rate: fmean(line[rate]) for rate in line}
        best = min(means, key=lambda rate: means[rate] if by_loss else -means[rate])
        shown = {rate: f"{mean:.{3 if by_loss else 1}f}" for rate, mean in means.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append([system, *(shown.get(rate, "") for rate in rates)])
    seeds = ", ".join(map(str, table.sweep["seed"]))
    title = f"Validation {'loss' if by_loss else 'score'} at each learning rate, mean over the seeds {seeds}:"
    return ["", title, "", *markdown(["method", *(f"{rate:g}" for rate in rates)], lines)]


def put_table(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with these lines at the table's place, if it has one.

    >>> put_table("a\\n<!-- x -->\\nold\\n<!-- end -->\\nb", "x", ["new"])
    'a\\n<!-- x -->\\nnew\\n<!-- end -->\\nb'
    """
    head, mark, rest = text.partition(f"<!-- {name} -->\n")
    if not mark:
        return text
    return head + mark + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :]


def tabulate(
    table: Table,
    cells: Sequence[Cell],
    scores: Mapping[str, Mapping[Column, Mapping[int, float]]],
    rows: Mapping[Run, Row],
) -> tuple[list[str], list[list[str]]]:
    """Header and lines: mean ± standard deviation, scores × 100 and losses as they are; against the named system
    difference, p, and p by Holm.
    """
    loss = table.show.get("loss")
    columns = sorted(
        {column for line in scores.values() for column in line},
        key=lambda column: (column == ("Avg",), column[-1] == loss, column),
    )
    # What a value is multiplied by, and its digits.
    scale = {column: (1, 3) if column[-1] == loss else (100, 1) for column in columns}
    against = table.show.get("against")
    header = ["method", *(["learning rate"] if table.sweep or table.rates_of else []), *(" ".join(c) for c in columns)]
    tests: dict[tuple[str, Column], PairedTest] = {}
    for column in columns:
        theirs = scores.get(against, {}).get(column, {}) if against else {}
        for system in scores:
            test = paired_test(scores[system].get(column, {}), theirs) if system != against else None
            if test is not None:
                tests[system, column] = test
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    for column in columns if tests else ():
        header.append(f"{' '.join(column)}: − {against}")
    lines = []
    for system in scores:
        line = [system]
        if table.sweep or table.rates_of:
            rates = sorted({c.run.lr for c in cells if c.system == system and not c.sweep and c.run in rows})
            line.append(", ".join(f"{rate:g}" for rate in rates))
        line += [_mean(list(scores[system].get(column, {}).values()), *scale[column]) for column in columns]
        for column in columns if tests else ():
            one = tests.get((system, column))
            factor, digits = scale[column]
            line.append(
                f"{factor * one.difference:+.{digits}f} (p {one.p:.2g}, Holm {corrected[system, column]:.2g})"
                if one
                else ""
            )
        lines.append(line)
    return header, lines


def _mean(values: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """Mean ± sample standard deviation, and how many where it is not five.

    >>> _mean([0.81, 0.82, 0.83, 0.82, 0.82])
    '82.0 ± 0.7'
    >>> _mean([0.81])
    '81.0 (1)'
    """
    if not values:
        return ""
    if not all(math.isfinite(value) for value in values):
        return f"diverged ({sum(not math.isfinite(value) for value in values)} of {len(values)})"
    text = f"{factor * fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {factor * stdev(values):.{digits}f}"
    return text if len(values) == 5 else f"{text} ({len(values)})"
