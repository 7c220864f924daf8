"""What the commands print and draw."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..display.plots import picture, require_plot_path
from ..display.reports import json_report
from ..factor_set import FactorSet
from ..storage.atomic import require_writable, write_whole
from ..storage.reading import absolute


def say(text: str) -> None:
    Console(stderr=True, markup=False).print(text, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    Console(markup=False).print(table)


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
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        for factors in results:
            print_table(factors.table(every=every))
