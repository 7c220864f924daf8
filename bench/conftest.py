"""Rows collected from the benchmarks, shown as one table and kept as one JSON file a question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from .machine import describe

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[Row], None]]:
    """Call with a row; at the module's end its rows go to results/{module}.json and, as a table, to the terminal."""
    rows: list[Row] = []
    yield rows.append
    name = request.module.__name__.rsplit(".", 1)[-1].removeprefix("test_")
    RESULTS.mkdir(exist_ok=True)
    content = {"command": "make bench", "machine": describe(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title=name)
    for column in rows[0] if rows else ():
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Console(width=120).print("\n", table)
