"""What the commands print and draw."""

from __future__ import annotations

import json
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..display.plots import picture, require_plot_path
from ..display.reports import json_report
from ..factor_set import FactorSet
from ..storage.atomic import require_writable, write_whole
from ..storage.reading import absolute

# Names and sentences may be folded into lines of this length, but no shorter ones.
_LEAST_FOLDED = 10


def say(text: str) -> None:
    Console(stderr=True, markup=False).print(text, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table, or its rows as lists where the terminal is too narrow for it: rich would cut the numbers off."""
    console = Console(markup=False)
    if _least_width(table) <= console.width:
        console.print(table)
        return
    console.print(table.title, highlight=False)
    first, *others = ([column.header, *column.cells, *filter(None, [column.footer])] for column in table.columns)
    for row, label in enumerate(first[1:], start=1):
        console.print(f"\n{label}", highlight=False)
        for cells in others:
            if row < len(cells) and cells[row]:
                console.print(f"  {cells[0]}: {cells[row]}", highlight=False)
    if table.caption:
        console.print(f"\n{table.caption}", highlight=False)


def _least_width(table: Table) -> int:
    """Columns of the terminal below which cells would be cut off, or names folded into pieces."""
    widths = (
        (max(cell_len(str(cell)) for cell in [column.header, column.footer, *column.cells]), column.no_wrap)
        for column in table.columns
    )
    return 1 + sum(3 + (width if whole else min(width, _LEAST_FOLDED)) for width, whole in widths)


def require_plot(path: Path | None) -> None:
    if path is not None:
        require_plot_path(path)
        require_writable(path)


def draw(factors: FactorSet, path: Path | None, model: Path) -> None:
    if path is not None:
        write_whole(path, picture(factors, factors.options, absolute(model).stem, path.suffix))


def show(results: list[FactorSet], as_json: bool, every: bool) -> None:
    """Print tables, or one JSON value: a list if there are several sets."""
    if as_json:
        reports = [json_report(factors, factors.options) for factors in results]
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2, allow_nan=False))
    else:
        for factors in results:
            print_table(factors.table(every=every))
