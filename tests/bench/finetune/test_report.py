"""The table from rows: every figure again from the rows by other means."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import t

from bench.finetune.__main__ import DOCUMENT, RESULTS
from bench.finetune.report import paired_test, write_report
from bench.finetune.rows import append_row, read_rows
from bench.finetune.run import Run
from bench.finetune.table import Table, load, names

SCORES = {"LoRA": [0.80, 0.81, 0.79, 0.80, 0.82], "IniLoRA": [0.82, 0.82, 0.80, 0.83, 0.82]}
SEEDS = [0, 11, 22, 33, 44]


@pytest.fixture
def table() -> Table:
    return Table(
        name="small",
        title="A small table",
        source="Made for a test.",
        settings={"task": "movie-sentiment", "lr": 1e-3},
        systems={"LoRA": {"method": "lora"}, "IniLoRA": {"method": "inilora"}},
        grid={"seed": SEEDS},
        show={"against": "LoRA", "plot": {"kind": "systems", "score": "accuracy"}},
    )


def row(run: Run, score: float) -> dict[str, Any]:
    return {
        "run": run.record(),
        "scores": {"accuracy": score, "loss": 0.5},
        "validation_score": score,
        "machine": {"commit": "abc1234"},
        "command": "python -m bench.finetune small",
    }


def fill(table: Table, folder: Path) -> None:
    for cell in table.cells({}):
        append_row(folder / "small.jsonl", row(cell.run, SCORES[cell.system][SEEDS.index(cell.run.seed)]))


def test_mean_deviation_and_paired_test_are_those_of_the_rows(table: Table, tmp_path: Path) -> None:
    fill(table, tmp_path)
    write_report(table, read_rows(tmp_path), tmp_path, Console(quiet=True))
    text = (tmp_path / "small.md").read_text()
    ours, theirs = np.array(SCORES["IniLoRA"]), np.array(SCORES["LoRA"])
    gap = ours - theirs
    p = 2 * t.sf(abs(gap.mean()) / (gap.std(ddof=1) / np.sqrt(5)), df=4)
    assert f"| LoRA | {100 * theirs.mean():.1f} ± {100 * theirs.std(ddof=1):.1f} |  |" in text
    expected = f"{100 * ours.mean():.1f} ± {100 * ours.std(ddof=1):.1f} | {100 * gap.mean():+.1f} (p {p:.2g}"
    assert f"| IniLoRA | {expected}, Holm {p:.2g}) |" in text
    assert "10 rows, at commit abc1234" in text
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_only_common_seeds_are_paired() -> None:
    test = paired_test({0: 0.9, 11: 0.8, 22: 0.7}, {11: 0.7, 22: 0.5, 33: 0.1})
    assert test is not None
    assert test.seeds == 2
    assert test.difference == pytest.approx(0.15)
    assert paired_test({0: 0.9}, {0: 0.8}) is None


def test_a_half_written_last_line_is_no_row_and_spoils_none(table: Table, tmp_path: Path) -> None:
    runs = [cell.run for cell in table.cells({})]
    append_row(tmp_path / "small.jsonl", row(runs[0], 0.8))
    with (tmp_path / "small.jsonl").open("a") as stream:
        stream.write('{"run": {"task"')
    assert set(read_rows(tmp_path)) == {runs[0]}
    append_row(tmp_path / "small.jsonl", row(runs[1], 0.9))
    assert {run: row["scores"]["accuracy"] for run, row in read_rows(tmp_path).items()} == {runs[0]: 0.8, runs[1]: 0.9}


def test_a_diverged_run_is_named_so(table: Table, tmp_path: Path) -> None:
    fill(table, tmp_path)
    broken = next(cell.run for cell in table.cells({}) if cell.system == "IniLoRA")
    append_row(tmp_path / "small.jsonl", row(broken, float("nan")))
    write_report(table, read_rows(tmp_path), tmp_path, Console(quiet=True))
    assert "| IniLoRA | diverged (1 of 5) |" in (tmp_path / "small.md").read_text()


def test_the_page_of_results_shows_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures take longest, and are no part of the page's text.
    monkeypatch.setattr("bench.finetune.report.draw", lambda *_: None)
    rows, document = read_rows(RESULTS), tmp_path / "results.md"
    document.write_text(DOCUMENT.read_text())
    shown = [name for name in names() if f"<!-- {name} -->" in DOCUMENT.read_text()]
    assert "reviews" in shown
    for name in shown:
        write_report(load(name), rows, tmp_path, Console(quiet=True), document)
    assert document.read_text() == DOCUMENT.read_text()


def test_every_number_of_the_pages_claims_is_in_its_tables() -> None:
    text = DOCUMENT.read_text()
    tables = "\n".join(part.split("<!-- end -->")[0] for part in re.split(r"<!-- [a-z-]+ -->\n", text)[1:])
    shown = set(re.findall(r"[\d.]*\d", tables))
    answer, rest = text.split("## How we know")
    earlier = rest.split("## Earlier runs")[1].split("What was changed on the way")[0]
    claims = " ".join(re.sub(r"\([^ )]*\)|-135M", "", answer + earlier).split())
    numbers = set(re.findall(r"\d+\.\d+", claims))
    assert len(numbers) > 20
    assert numbers <= shown, f"not in any table: {sorted(numbers - shown)}"
    # A difference with its interval is one cell, and what is said of a method is in a line of that method's.
    intervals = set(re.findall(r"[+-]\d+\.\d+ \[[^\]]+\]", claims))
    assert len(intervals) > 5
    assert not [one for one in intervals if f"| {one} |" not in tables]
    methods = r"(?<![\w-])(IniLoRA-α|β|PiSSA|MiLoRA|(?:Ini)?LoRA)"
    named = re.findall(methods + r"(?: has| at| is at)? ([+-]?\d+\.\d+)", claims)
    assert len(named) > 15
    for name, number in named:
        label = "IniLoRA-β (K-U)" if name == "β" else name
        lines = [line for line in tables.splitlines() if line.startswith(f"| {label} |")]
        assert any(number in line.replace("|", " ").split() for line in lines), (name, number)


def test_losses_have_a_column_and_a_sweep_has_a_table(tmp_path: Path) -> None:
    sweep = {"lr": [1e-4, 1e-3], "seed": [0, 11], "by": "loss"}
    table = replace(load("reviews-rating"), name="small", sweep=sweep, systems={"LoRA": {"method": "lora"}})
    rows: dict[Run, Any] = {}
    while missing := [cell for cell in table.cells(rows) if cell.run not in rows]:
        for cell in missing:
            loss = 1.5 if cell.run.lr == 1e-4 else float(1 + cell.run.seed / 110)
            measured = {"scores": {"pearson": 0.5, "loss": loss}, "metrics": {"validation": {"loss": loss}}}
            rows[cell.run] = {**row(cell.run, 0.5), **measured}
    write_report(table, rows, tmp_path, Console(quiet=True))
    text = (tmp_path / "small.md").read_text()
    # The mean of 1.0, 1.1, 1.2, 1.3, 1.4; the two seeds that choose have 1.0 and 1.1.
    assert "| method | learning rate | pearson | squared error |" in text
    assert "| LoRA | 0.001 | 50.0 ± 0.0 | 1.200 ± 0.158 |" in text
    assert (
        "mean over the seeds 0, 11:\n\n| method | 0.0001 | 0.001 |\n| --- | ---: | ---: |\n| LoRA | 1.500 | **1.050** |"
        in text
    )


def test_a_figure_of_losses_is_drawn_though_it_has_no_scores(table: Table, tmp_path: Path) -> None:
    figure = replace(table, show={"plot": {"kind": "loss"}})
    for cell in figure.cells({}):
        append_row(
            tmp_path / "small.jsonl", {**row(cell.run, 0.5), "scores": {}, "training_loss": [[1, 2.0], [2, 1.0]]}
        )
    write_report(figure, read_rows(tmp_path), tmp_path, Console(quiet=True))
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
