"""Peak memory of a run, as a multiple of the bytes of the weights in its batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import save_file

from .harness import Row

# A process of its own, whose imports and compiled kernels are counted before the run and taken off.
SCRIPT = """
import json, sys
import torch
from bench.harness import PeakMemory
from inilora_kernels import approximate, approximate_model

dtype = getattr(torch, sys.argv[2])
for size in 100, 1500:
    approximate((torch.randn(size, size) * 0.05).to(dtype), rank=8, steps=2)
peak = PeakMemory()
approximate_model(sys.argv[1], rank=8, steps=20, cache=False, progress=False)
print(json.dumps(peak.bytes()))
"""


@pytest.mark.parametrize(
    ("count", "size", "dtype"),
    [(12, 384, "float32"), (8, 2048, "float32"), (4, 4096, "float32"), (4, 4096, "bfloat16")],
)
def test_memory(
    count: int,
    size: int,
    dtype: str,
    tmp_path: Path,
    benchmark: BenchmarkFixture,
    record: Callable[[Row], None],
) -> None:
    kind = getattr(torch, dtype)
    tensors = {
        f"layer.{i}.{name}.weight": (torch.randn(size, size) * 0.05).to(kind)
        for i in range(count // 2)
        for name in ("query", "value")
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)

    def run() -> int:
        command = [sys.executable, "-c", SCRIPT, str(path), dtype]
        return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    peak = benchmark.pedantic(run, rounds=1)
    weights = count * size * size * kind.itemsize
    row = {
        "matrices": f"{count}×{size}²",
        "dtype": dtype,
        "weights MiB": weights / 2**20,
        "peak MiB": peak / 2**20,
        "peak / weights": peak / weights,
    }
    benchmark.extra_info.update(row)
    record(row)
