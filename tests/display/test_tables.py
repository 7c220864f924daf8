"""What a terminal of 80 columns shows of a small and of a large result."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from inilora_kernels.cli.methods import methods_table
from inilora_kernels.display.tables import result_table, spectrum_table, truncation_table
from inilora_kernels.initializations import METHODS

from .synthetic import SEVEN, all_linear, one


def shown(table: Table | None) -> str:
    assert table is not None
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_large_result_is_summed_up_by_kind() -> None:
    lines = shown(result_table(all_linear(), {"method": "inilora", "solver": "krylov"})).splitlines()
    rows = [line for line in lines if "24×16" in line]
    assert len(rows) == 7
    assert all(kind in row and " 30 " in row for kind, row in zip(SEVEN, rows, strict=True))
    assert "inilora by krylov, rank 8, 210 matrices" in lines[0]
    assert "keeps 15.0 % of the energy ‖W‖², 100 % of what the rank can keep" in lines[-1]


@pytest.mark.parametrize("every", [False, True])
def test_every_table_fits_80_columns(every: bool) -> None:
    factors = all_linear(252.0, 0.6)
    text = shown(result_table(factors, {"method": "inilora-alpha"}, every=every))
    text += shown(spectrum_table(factors, every=every))
    text += shown(truncation_table(dict.fromkeys(factors, 0.1), 4, every=every))
    text += shown(methods_table(METHODS))
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "…" not in text.replace("σ₁, …", "")


def test_a_start_that_does_not_approximate_is_not_called_energy_kept() -> None:
    text = shown(result_table(all_linear(94.12, 0.6), {"method": "inilora-alpha"}))
    assert "-" not in text.replace("-alpha", "")
    assert "94.1×" in text
    assert "does not approximate W" in text
    assert "the best BA keeps 40.0 %" in " ".join(text.split())


def test_the_worst_excess_of_a_kind_is_the_one_shown() -> None:
    factors = {"h.0.q": one(0.5, 0.5), "h.1.q": one(0.55, 0.5), "h.0.v": one(0.5, 0.5), "h.1.v": one(0.5, 0.5)}
    text = shown(result_table(factors, {"method": "inilora"}))
    row = next(line for line in text.splitlines() if " q " in line)
    assert "≤ 1.0e-01" in row
    assert "52.5 %" in row
