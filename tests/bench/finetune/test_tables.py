"""The YAML files name runs that the runner can do, and a sweep gives each method its own best rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.finetune import word_problems
from bench.finetune.benchmarks import BENCHMARKS
from bench.finetune.data import GLUE, INSTRUCTIONS, MOVIES
from bench.finetune.run import Run
from bench.finetune.systems import ADAPTERS
from bench.finetune.table import Table, load, names
from inilora_kernels.initializations import METHODS

PAPER = {
    *("table1", "table2", "table3", "table4", "table6", "table7"),
    *("figure2", "figure3", "figure4", "figure5", "figure6"),
}
SEEDS = [0, 11, 22, 33, 44]


def finished(run: Run, score: float) -> dict[str, Any]:
    return {"run": run.record(), "validation_score": score, "scores": {"accuracy": score}}


def test_every_table_and_figure_of_the_paper_is_there() -> None:
    assert set(names()) >= PAPER


@pytest.mark.parametrize("name", names())
def test_every_run_is_one_that_can_be_done(name: str) -> None:
    # A rate for every sweep: whatever its outcome, the other settings are the same.
    table = replace(load(name), sweep=None, rates_of=None)
    table = replace(table, settings={"lr": 1e-3, **table.settings})
    runs = [cell.run for cell in table.cells({})]
    assert len(runs) >= 6
    for run in runs:
        assert run.task in {*GLUE, *MOVIES, *INSTRUCTIONS, word_problems.NAME}
        assert run.method in {*METHODS, *ADAPTERS, "full", "bitfit"}
        assert run.solver is None or run.solver in METHODS[run.method].solvers
        assert set(run.evaluations) <= {*BENCHMARKS, "exact-match"}
        assert run.form in ("residual", "delta")
        assert run.batch_size % (run.device_batch_size or run.batch_size) == 0
        assert Run.from_record(run.record()) == run
    if name in PAPER and name.startswith("table"):
        assert sorted({run.seed for run in runs}) == SEEDS


def test_table1_has_the_papers_settings() -> None:
    runs = [cell.run for cell in load("table1").cells({}) if cell.system == "IniLoRA"]
    assert len(runs) == 6 * 5
    settings = {(run.lr, run.epochs, run.warmup_ratio, run.batch_size, run.max_length, run.rank) for run in runs}
    assert settings == {(3e-4, 100, 0.06, 32, 512, 8)}


@pytest.fixture
def swept() -> Table:
    return Table(
        name="swept",
        title="",
        source="",
        settings={"task": "movie-sentiment"},
        systems={"LoRA": {"method": "lora"}, "PiSSA": {"method": "pissa"}},
        grid={"seed": SEEDS},
        show={},
        sweep={"lr": [1e-4, 1e-3, 1e-2], "lr_of": {"PiSSA": [1e-5, 1e-4]}, "seed": [0, 11]},
    )


def test_a_sweep_is_run_first_and_its_best_rate_with_every_seed(swept: Table) -> None:
    first = list(swept.cells({}))
    assert all(cell.sweep for cell in first)
    assert len(first) == 3 * 2 + 2 * 2
    # The best rate is that of the best mean; a diverged run counts as the worst there is.
    scores = {1e-5: [0.6, 0.6], 1e-4: [0.5, 0.5], 1e-3: [0.7, 0.9], 1e-2: [0.95, float("nan")]}
    rows = {cell.run: finished(cell.run, scores[cell.run.lr][cell.run.seed == 11]) for cell in first}
    final = [cell for cell in swept.cells(rows) if not cell.sweep]
    assert [(cell.system, cell.run.lr, cell.run.seed) for cell in final] == [
        *(("LoRA", 1e-3, seed) for seed in SEEDS),
        *(("PiSSA", 1e-5, seed) for seed in SEEDS),
    ]
    # As long as one run of a system's sweep is missing, none of its others is named.
    missing = dict(rows)
    del missing[first[0].run]
    assert {cell.system for cell in swept.cells(missing) if not cell.sweep} == {"PiSSA"}


def test_a_table_takes_its_rates_from_anothers_sweep() -> None:
    reviews, stopping = load("reviews"), load("reviews-stopping")
    assert list(stopping.cells({})) == []
    rows = {
        cell.run: finished(cell.run, 1 - abs(cell.run.lr - 3e-3))
        for cell in reviews.cells({})
        if cell.system == "IniLoRA"
    }
    runs = [cell.run for cell in stopping.cells(rows)]
    assert len(runs) == 4 * 5
    assert {run.lr for run in runs} == {3e-3}
    # The run of all steps is a run of the other table, and has to be done once only.
    assert {run for run in runs if run.steps == 20_000} == {
        cell.run for cell in reviews.cells(rows) if cell.system == "IniLoRA" and not cell.sweep
    }


def of_loss(run: Run, loss: float) -> dict[str, Any]:
    return {"run": run.record(), "metrics": {"validation": {"loss": loss}}, "validation_score": 1.0, "scores": {}}


def test_a_grid_grows_until_the_least_validation_loss_lies_between_others(swept: Table) -> None:
    sweep = {"lr": [1e-3, 3e-3], "seed": [0, 11], "by": "loss", "extend": True, "settings": {"test": False}}
    table = replace(swept, systems={"LoRA": {"method": "lora"}}, sweep=sweep, common_rate=3e-4)
    rows: dict[Run, Any] = {}
    tried = []
    while new := [cell for cell in table.cells(rows) if cell.sweep and cell.run not in rows]:
        tried.append(sorted({cell.run.lr for cell in new}))
        for cell in new:
            assert not cell.run.test
            # The best is 0.01; 0.1 would diverge.
            loss = {1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0, 3e-2: 2.5}[cell.run.lr]
            rows[cell.run] = of_loss(cell.run, loss)
    assert tried == [[1e-3, 3e-3], [1e-2], [3e-2]]
    # Three rates and the neighbour that the best needed, and each seed of the grid at the best and at the common rate.
    assert table.total(rows) == 4 * 2 + 2 * 5
    assert table.total({}) == 2 * 2 + 2 * 5
    # A best rate that is the common one is run once.
    assert replace(table, common_rate=1e-2).total(rows) == 4 * 2 + 5
    final = {(cell.run.lr, cell.common, cell.run.test) for cell in table.cells(rows) if not cell.sweep}
    assert final == {(1e-2, False, True), (3e-4, True, True)}
    # A diverged rate ends the grid as a worse one does.
    top = next(run for run in rows if run.lr == 3e-2)
    rows[top] = of_loss(top, float("nan"))
    assert table.best_rate("LoRA", {**table.settings, **table.systems["LoRA"]}, rows) == 1e-2
