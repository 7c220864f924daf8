"""What bench.gpu and bench.table5 will do on a GPU, here with the interpreter on tiny matrices."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, table5
from inilora_kernels.kernels.gpu.backend import TritonBackend
from tests.kernels.gpu.cases import CPU, PRODUCT_ERROR
from tests.kernels.gpu.interpreter import interpreted

SHAPES = ((20, 40), (33, 24))


def test_correctness_and_repeats_and_step_time_of_the_interpreter() -> None:
    with interpreted():
        backend = TritonBackend(CPU)
        row = gpu.correctness(backend, "bfloat16", 4, SHAPES, steps=2)
        assert row["products"] < PRODUCT_ERROR[torch.bfloat16]
        assert row["factors"] < 50 * PRODUCT_ERROR[torch.bfloat16]
        assert gpu.repeats(backend, "float32", 4, SHAPES, steps=2)["bit_equal"]
        row = gpu.step_time(backend, SHAPES[0], "float32", 4, count=2, steps=1)
        assert row["matrices"] == 2
        assert row["seconds"] > 0
        assert json.dumps(row)


def test_a_wrong_kernel_shows_in_the_correctness_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gradient_products", lambda W, A, B: (B.T @ W * 1.001, W @ A.T))
    with interpreted():
        row = gpu.correctness(TritonBackend(CPU), "float32", 4, SHAPES, steps=1)
    assert row["products"] > 100 * PRODUCT_ERROR[torch.float32]


def test_parts_that_fail_or_come_too_late_are_told() -> None:
    def fails() -> gpu.Row:
        raise RuntimeError("no kernel image")

    rows, left = gpu.collected([("one", lambda: {"seconds": 1.0}), ("two", fails)], time.monotonic() + 60)
    assert rows == [{"seconds": 1.0}, {"part": "two", "error": "RuntimeError: no kernel image"}]
    assert left == []
    rows, left = gpu.collected([("one", dict)], time.monotonic() - 1)
    assert (rows, left) == ([], ["one"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])


def test_table5_writes_rows_table_and_plot(tmp_path: Path) -> None:
    table5.main(["--models", "RoBERTa Base", "--steps", "2", "--output", str(tmp_path)])
    row = json.loads((tmp_path / "table5.json").read_text())["rows"][0]
    assert row["paper"]["minutes"] == 2.0
    for way in ("ours", "paper's way"):
        own = row["measured"][way]
        assert own["steps"] == 2
        assert own["extrapolated"] == (not torch.cuda.is_available() or way != "ours" or own["steps"] < 20_000)
        whole, part = row["matrices"] * 20_000, own["matrices"] * own["steps"]
        assert own["minutes"] == pytest.approx(own["seconds"] / 60 * whole / part)
    text = (tmp_path / "table5.md").read_text()
    assert "| RoBERTa Base | 2.0 | 0.8 |" in text
    assert "~" in text
    assert (tmp_path / "table5.png").read_bytes().startswith(b"\x89PNG")


def test_table5_reads_a_real_checkpoint(minilm: Path) -> None:
    loaders = table5.loaders(table5.MODELS[0], minilm)
    assert [shape for shape, _ in loaders] == [(384, 384)] * 12
    assert loaders[0][1]().shape == (384, 384)


def test_synthetic_weights_have_a_bulk_and_a_few_large_directions() -> None:
    values = torch.linalg.svdvals(table5.synthetic((512, 384), torch.float32, 0))
    # The first direction stands clear of the bulk's edge, and the bulk is no low rank: half its values are close.
    assert values[0] > 1.3 * values[64]
    assert values[100] < 2 * values[200]
