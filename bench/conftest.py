"""Rows collected from the benchmarks that pytest runs, one result per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .harness import Row, publish


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[Row], None]]:
    """Call it with a row; at the module's end its rows are published under the module's name, without `test_`."""
    rows: list[Row] = []
    yield rows.append
    name = request.module.__name__.rsplit(".", 1)[-1].removeprefix("test_")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        publish(name, name, rows, "make bench")
