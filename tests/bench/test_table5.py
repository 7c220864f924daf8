"""The paper's Table 5: rows, files, and the synthetic weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import six_models, table5


def test_table5_writes_rows_table_and_plot(tmp_path: Path) -> None:
    table5.main(["--models", "RoBERTa Base", "--steps", "2", "--output", str(tmp_path)])
    record = table5.record(tmp_path)
    assert [one["paper min"] for one in record["predicted"]["rows"]] == [2.0, 4.1, 25.8, 18.2, 15.7, 54.6]
    [row] = record["measured"]["rows"]
    for way in six_models.WAYS:
        # Two steps of 20,000: whatever the machine, the rest is extrapolated, and says so.
        assert row[f"{way} extrapolated"]
        matrices, steps, seconds = re.match(r"(\d+) matrices × (\d+) steps in (.*) s", row[f"{way} run"]).groups()
        assert int(steps) == 2
        whole, part = row["matrices"] * 20_000, int(matrices) * 2
        # The seconds are shown with three digits.
        assert row[f"{way} min"] == pytest.approx(float(seconds) / 60 * whole / part, rel=0.01)
        assert row[f"{way} GB"] >= int(matrices) * 768 * 768 * 4 / 1e9
    assert "| RoBERTa Base | 24 | float32 | 2 | 0.8 |" in (tmp_path / "table5.md").read_text()
    assert (tmp_path / "table5.png").read_bytes().startswith(b"\x89PNG")


def test_new_predictions_leave_the_measurements_on_record(tmp_path: Path) -> None:
    measured = {
        "command": "make bench-table5",
        "machine": {"processor": "another", "threads": 2, "torch": "2.13.0", "commit": "eb8d595"},
        "note": "",
        "rows": [{"model": "LLaMA2-7B", "matrices": 64, "ours min": 77.9, "paper's way min": 3792.0}],
    }
    stale = {**measured, "rows": [{"model": "LLaMA2-7B", "predicted min": 1e9}]}
    (tmp_path / "table5.json").write_text(json.dumps({"predicted": stale, "measured": measured}))
    table5.main(["--predict", "--output", str(tmp_path)])
    record = table5.record(tmp_path)
    assert record["measured"] == measured
    assert record["predicted"]["rows"] == [table5.predicted_row(model) for model in six_models.MODELS]
    assert "| LLaMA2-7B | 64 | 77.9 | 3792 |" in (tmp_path / "table5.md").read_text()


def test_the_predictions_on_record_are_the_cost_models_of_today() -> None:
    rows = table5.record(table5.RESULTS)["predicted"]["rows"]
    for model, row in zip(six_models.MODELS, rows, strict=True):
        # They move with the model's numbers: `python -m bench.table5 --predict` writes them anew.
        fresh = table5.predicted_row(model)
        assert row["model"] == fresh["model"]
        assert row["predicted min"] == pytest.approx(fresh["predicted min"], rel=1e-9)


def test_table5_reads_a_real_checkpoint(minilm: Path) -> None:
    loaders = table5.checkpoint_loaders(minilm)
    assert [shape for shape, *_ in loaders] == [(384, 384)] * 12
    assert loaders[0][-1]().shape == (384, 384)


def test_synthetic_weights_have_a_bulk_and_a_few_large_directions() -> None:
    values = torch.linalg.svdvals(six_models.synthetic((512, 384), torch.float32, 0))
    # The first direction stands clear of the bulk's edge, and the bulk is no low rank: half its values are close.
    assert values[0] > 1.3 * values[64]
    assert values[100] < 2 * values[200]
