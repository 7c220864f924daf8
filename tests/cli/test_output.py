"""What the commands print: tables for people, one JSON value for programs, and nothing drawn that was not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from inilora_kernels import FactorSet
from inilora_kernels.cli.output import draw, print_table, require_plot, show
from inilora_kernels.display.tables import result_table
from inilora_kernels.errors import InitializationError

from ..display.synthetic import all_linear, one


def sets(*ranks: int) -> list[FactorSet]:
    return [FactorSet({"h.0.q": one(rank=rank), "h.0.v": one(rank=rank)}, {"rank": rank}) for rank in ranks]


def test_several_sets_are_one_json_list(capsys: pytest.CaptureFixture[str]) -> None:
    show(sets(2), as_json=True, every=False)
    alone = json.loads(capsys.readouterr().out)
    show(sets(2, 4), as_json=True, every=False)
    first, second = json.loads(capsys.readouterr().out)
    assert first == alone
    assert (first["options"]["rank"], second["options"]["rank"]) == (2, 4)


def test_a_table_for_each_set(capsys: pytest.CaptureFixture[str]) -> None:
    show(sets(2, 4), as_json=False, every=True)
    printed = capsys.readouterr().out
    assert printed.index("rank 2") < printed.index("rank 4")


def test_a_plot_is_asked_for_or_there_is_none(tmp_path: Path) -> None:
    require_plot(None)
    draw(sets(2)[0], None, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InitializationError, match=r"\.png"):
        require_plot(tmp_path / "plot.txt")
    require_plot(tmp_path / "plot.png")
    draw(sets(2)[0], tmp_path / "plot.png", tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_no_number_is_cut_off_however_narrow_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    factors = all_linear(252.0, 0.6)
    for every in (False, True):
        table = result_table(factors, {"method": "inilora-alpha"}, every=every)
        print_table(table)
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert shown.count("252") >= (210 if every else 7)
        assert all(cell_len(line) <= width for line in shown.splitlines())


def test_a_terminal_of_a_few_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """rich raises an AssertionError in one of one column."""
    monkeypatch.setenv("COLUMNS", "1")
    show(sets(2), as_json=False, every=True)
    assert capsys.readouterr().out
