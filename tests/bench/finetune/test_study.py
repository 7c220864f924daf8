"""A study's page and picture from rows that were made so that the answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.finetune.report import write_report
from bench.finetune.rows import append_row, read_rows
from bench.finetune.run import Run
from bench.finetune.table import Table, load

EXAMPLES = 300


@pytest.fixture
def table() -> Table:
    whole = load("reviews-power")
    systems = {label: whole.systems[label] for label in ("LoRA", "IniLoRA", "IniLoRA-α")}
    return replace(whole, name="study", systems=systems, grid={"seed": list(range(8))})


def row(run: Run, system: str) -> dict[str, Any]:
    """The best rate is 0.003 for all; IniLoRA is right where LoRA is, IniLoRA-α in 6 of 100 examples less."""
    random = np.random.default_rng(run.seed)
    right = random.random(EXAMPLES) < 0.8
    if system == "IniLoRA-α":
        right &= random.random(EXAMPLES) < 0.925
    loss = 0.4 + abs(np.log10(run.lr / 3e-3))
    return {
        "run": run.record(),
        "scores": {"accuracy": float(right.mean())},
        "validation_score": 0.5,
        "metrics": {"validation": {"loss": loss}},
        "per_example": [1.0 if one else -1.0 for one in right],
        "machine": {"commit": "abc1234"},
        "command": "python -m bench.finetune study",
    }


def test_a_study_cut_off_says_how_many_rows_are_missing(table: Table, tmp_path: Path) -> None:
    cells = [cell for cell in table.cells({}) if cell.system == "LoRA" and (cell.sweep or cell.run.seed < 4)]
    for cell in cells:
        append_row(tmp_path / "study.jsonl", row(cell.run, cell.system))
    write_report(table, read_rows(tmp_path), tmp_path, Console(quiet=True))
    text = (tmp_path / "study.md").read_text()
    assert f"\n{3 * 3 + 4} of {3 * 3 * 3 + 3 * 8 * 2} rows" in text
    assert "Not finished at its best rate nor at the common one: IniLoRA, IniLoRA-α." in text


def test_a_study_says_what_differs_and_what_is_the_same(table: Table, tmp_path: Path) -> None:
    rows: dict[Run, Any] = {}
    while missing := [cell for cell in table.cells(rows) if cell.run not in rows]:
        rows |= {cell.run: row(cell.run, cell.system) for cell in missing}
    write_report(table, rows, tmp_path, Console(quiet=True))
    text = (tmp_path / "study.md").read_text()
    best, common = text.split("All at 0.0003:")
    for part, rate in ((best, "0.003"), (common, "0.0003")):
        compared = part.split("Validation loss")[0]
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in compared.splitlines()}
        assert f"| LoRA | {rate} | 8 |" in lines["LoRA"] + " |"
        # No example differs: no interval, and the same within any margin.
        assert "+0.0 [+0.0, +0.0]" in lines["IniLoRA"]
        assert "| yes (p 0)" in lines["IniLoRA"]
        assert "| not shown" in lines["IniLoRA-α"]
        assert lines["IniLoRA-α"].split(" | ")[4].startswith("-")
    # IniLoRA-α starts one step lower, and its grid has grown upwards; 0.4 plus the distance to 0.003 in decades.
    assert "| method | 0.0003 | 0.001 | 0.003 | 0.01 |" in text
    assert "| IniLoRA-α | 1.400 | 0.877 | **0.400** | 0.923 |" in text
    # Three systems, 3 + 3 + 4 rates with three seeds, and eight seeds twice.
    assert f"\n{10 * 3 + 3 * 8 * 2} of {10 * 3 + 3 * 8 * 2} rows" in text
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_exact_match_is_counted_from_the_answers_of_each_row(tmp_path: Path) -> None:
    whole = load("word-problems-exact")
    systems = {label: {**whole.systems[label], "lr": 0.01} for label in ("LoRA", "PiSSA")}
    table = replace(whole, name="exact", systems=systems, rates_of=None, grid={"seed": [0, 11, 22]})
    for cell in table.cells({}):
        # LoRA is right in 2 of 8, PiSSA in 4, both with every seed: the templates alone differ.
        right = 4 if cell.system == "PiSSA" else 2
        answers = [[at % 4, "1" if at < right else None, "1"] for at in range(8)]
        append_row(tmp_path / "exact.jsonl", {**row(cell.run, cell.system), "answers": answers})
    write_report(table, read_rows(tmp_path), tmp_path, Console(quiet=True))
    lines = (tmp_path / "exact.md").read_text().splitlines()
    assert "| method | learning rate | seeds | exact match | − LoRA [95 %] | p (Holm) | within ±2.0 |" in lines
    assert "| LoRA | 0.01 | 3 | 25.0 |  |  |  |" in lines
    found = next(line for line in lines if line.startswith("| PiSSA"))
    assert found.startswith("| PiSSA | 0.01 | 3 | 50.0 | +25.0 [")
    # By template PiSSA gains 0, 0, 50 and 50 points: 4 drawn have a deviation of 12.5, with 3 seeds √(3/2) of it.
    low, high = (float(one) for one in found.split("[")[1].split("]")[0].split(", "))
    assert (high - low) / 2 == pytest.approx(4.3027 * 12.5 * 1.5**0.5, rel=0.05)
