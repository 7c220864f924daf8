"""The quick form of the real thing: the real model and data, every row's promises, a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from bench.finetune import workers
from bench.finetune.__main__ import main
from bench.finetune.benchmarks import missing_packages
from bench.finetune.data import load_task
from bench.finetune.run import Run
from bench.finetune.systems import prepare
from bench.finetune.table import Table, load
from bench.finetune.training import finetune

ROOT = Path(__file__).parents[3]
QUICK = ["reviews", "--quick", "--system", "IniLoRA (krylov)"]
# Two rates for one seed each, and the better one's second seed.
RUNS = 2 + 1

# Dies where it hurts most: with half of the second row on disk.
KILLED = """
import os, runpy, signal, sys
import bench.finetune.workers as workers
whole = workers.append_row
def append(file, row):
    if file.exists():
        with file.open("a") as stream:
            stream.write('{"table": "reviews", "run": {"task": "mov')
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    whole(file, row)
workers.append_row = append
if __name__ == "__main__":
    runpy.run_module("bench.finetune", run_name="__main__")
"""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "reviews.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def killed(arguments: list[str], script: Path) -> subprocess.CompletedProcess[str]:
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Result]:
    """`python -m bench.finetune` in this process, which has imported all that it needs; its workers are their own."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    monkeypatch.chdir(ROOT)

    def run(arguments: list[str]) -> Result:
        monkeypatch.setattr(sys, "argv", ["bench.finetune", *arguments])
        return CliRunner().invoke(app, arguments, env={"HF_HUB_OFFLINE": "1", "COLUMNS": "200"})

    return run


def test_a_killed_run_goes_on_where_it_was_and_ends_as_a_whole_one(
    tmp_path: Path, minilm: Path, program: Callable[[list[str]], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    done = killed([*QUICK, "--results", str(broken)], tmp_path / "killed.py")
    assert done.returncode == -signal.SIGKILL, done.stderr
    first = rows_of(broken)
    assert len(first) == 1
    resumed = program([*QUICK, "--results", str(broken)])
    assert resumed.exit_code == 0, resumed.output
    rows = rows_of(broken)
    assert rows[0] == first[0]
    assert len({json.dumps(row["run"]) for row in rows}) == len(rows) == RUNS
    for row in rows:
        assert row["run"]["max_steps"] == 4
        assert row["examples"] == {"train": 64, "validation": 64, "test": 64}
        # Query and value of six layers, 384×384, at rank 8, and a head for two classes.
        assert row["trainable_parameters"] == 12 * 8 * (384 + 384) + 2 * 384 + 2
        assert 0 <= row["scores"]["accuracy"] <= 1
        assert len(row["machine"]["commit"]) >= 7
        assert row["command"].startswith("python -m bench.finetune reviews --quick")
    table = (broken / "reviews.md").read_text()
    assert "| IniLoRA (krylov) |" in table
    assert f"{RUNS} rows, at commit" in table
    assert (broken / "reviews.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing is left to be run.
    before = (broken / "reviews.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "finetune", None)
        assert program([*QUICK, "--results", str(broken)]).exit_code == 0
    assert (broken / "reviews.jsonl").read_bytes() == before
    # Another process has the same result from the same settings.
    again = finetune(Run.from_record(rows[0]["run"]), minilm, None, tmp_path / "checkpoints")
    assert {name: again[name] for name in ("scores", "training_loss")} == {
        name: rows[0][name] for name in ("scores", "training_loss")
    }


def test_an_unknown_table_is_refused(program: Callable[[list[str]], Result]) -> None:
    done = program(["table9"])
    assert done.exit_code == 2
    assert "table9" in done.output


def test_a_table_without_the_rates_it_takes_is_refused(program: Callable[[list[str]], Result], tmp_path: Path) -> None:
    done = program(["reviews-stopping", "--results", str(tmp_path)])
    assert done.exit_code == 2
    assert "takes its learning rates from reviews, which is not finished" in done.output


def test_what_an_evaluation_needs_is_asked_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.finetune.benchmarks.find_spec", lambda name: None if name == "math_verify" else name)
    assert load("table2").evaluations() == ["gsm8k", "humaneval", "math", "mmlu"]
    assert missing_packages(load("table2").evaluations()) == ["math-verify[antlr4_13_2]"]
    assert missing_packages(["gsm8k"]) == []


def test_without_adapterhub_the_other_rows_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.finetune.__main__.find_spec", lambda name: None)
    asked: list[Table] = []
    monkeypatch.setattr("bench.finetune.__main__.run_table", lambda table, *_, **__: asked.append(table))
    main(["table1"], model=tmp_path, results=tmp_path)
    assert list(asked[0].systems) == ["full fine-tuning", "BitFit", "LoRA", "IniLoRA"]
    left_out = "Adapter (Houlsby), Adapter (Pfeiffer), Adapter (Lin), AdapterDrop"
    assert f"left out, as AdapterHub's `adapters` is not installed: {left_out}" in capsys.readouterr().err
    # Asked for alone, a row is not left out in silence.
    main(["table1"], model=tmp_path, results=tmp_path, system=["Adapter (Lin)"])
    assert list(asked[1].systems) == ["Adapter (Lin)"]


@pytest.mark.parametrize("method", ["lora", "pissa", "inilora-alpha", "full", "bitfit"])
def test_what_trains_and_that_the_head_starts_the_same(method: str, minilm: Path) -> None:
    settings = Run("movie-sentiment", method, lr=1e-3, seed=11, rank=4)
    network, found = prepare(settings, minilm, 2)
    reference, _ = prepare(Run("movie-sentiment", "full", lr=1e-3, seed=11), minilm, 2)
    assert torch.equal(network.classifier.weight, reference.classifier.weight)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    others = {name for name in trained if not name.startswith("classifier")}
    if method == "full":
        assert len(others) > 90
    elif method == "bitfit":
        assert all(name.endswith(".bias") for name in others)
        assert others
    else:
        assert len(others) == 24
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in others)
        assert found["excess"] > -1e-9
    ids = torch.tensor([[101, 2023, 3185, 2003, 2307, 102]])
    with torch.no_grad():
        difference = network.eval()(input_ids=ids).logits - reference.eval()(input_ids=ids).logits
    # Float32 sums of 384 products, whose parts are IniLoRA-α's BA, about 35 times W.
    assert difference.abs().max() < (1e-3 if method == "inilora-alpha" else 1e-4)


@pytest.mark.parametrize("name", ["movie-sentiment", "movie-rating"])
def test_the_split_is_fixed_and_its_parts_are_apart(name: str, minilm: Path) -> None:
    task = load_task(name, minilm, None, 24, None, None)
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    sizes = {part: len(rows) for part, rows in parts.items() if rows is not None}
    assert sizes == {"train": 2299, "validation": 928, "test": 1474}
    sentences = [tuple(ids) for rows in parts.values() if rows is not None for ids in rows["input_ids"]]
    assert len(set(sentences)) == len(sentences)
    if name == "movie-sentiment":
        # The first examples, which a smaller training takes, have both classes as the whole does.
        assert 0.4 < sum(task.train["labels"][:500]) / 500 < 0.6
