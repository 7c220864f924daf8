"""The paper's Table 5: rows, files, and the synthetic weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import table5


def test_table5_writes_rows_table_and_plot(tmp_path: Path) -> None:
    table5.main(["--models", "RoBERTa Base", "--steps", "2", "--output", str(tmp_path)])
    row = json.loads((tmp_path / "table5.json").read_text())["table5"]["rows"][0]
    assert row["paper min"] == 2.0
    for way in table5.WAYS:
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


def test_table5_reads_a_real_checkpoint(minilm: Path) -> None:
    loaders = table5.loaders(table5.MODELS[0], minilm)
    assert [shape for shape, *_ in loaders] == [(384, 384)] * 12
    assert loaders[0][-1]().shape == (384, 384)


def test_synthetic_weights_have_a_bulk_and_a_few_large_directions() -> None:
    values = torch.linalg.svdvals(table5.synthetic((512, 384), torch.float32, 0))
    # The first direction stands clear of the bulk's edge, and the bulk is no low rank: half its values are close.
    assert values[0] > 1.3 * values[64]
    assert values[100] < 2 * values[200]
