"""What bench.gpu does on a GPU, here with the interpreter on tiny matrices."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu
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
