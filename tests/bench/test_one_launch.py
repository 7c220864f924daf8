"""What docs/kernels.md says of thousands of steps in one launch, held to today's cost model."""

from __future__ import annotations

import pytest

from bench.one_launch import CHIPS, ROWS, TABLE5, a_program_a_matrix, main, on_the_chip, today
from inilora_kernels.kernels.gpu.gpus import GPUS


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("row", TABLE5)
def test_without_clusters_no_design_makes_table_5s_small_rows_three_times_as_fast(row: str, name: str) -> None:
    count, matrix = ROWS[row]
    now = today(count, matrix, GPUS[name])
    assert now / on_the_chip(count, matrix, name) < 2.5
    assert now / a_program_a_matrix(count, matrix, name) < 1.6


def test_it_prints_a_row_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert CHIPS.keys() == GPUS.keys()
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(ROWS)
    assert "44.6; 2.4; 0.3" in lines[2]
