"""Every format of the benchmark is read; the high-water mark of reading one is a matrix and its packed words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.harness import in_own_process
from bench.reading import FORMATS, write
from inilora_kernels.model.formats.weight import MOST_IN_STRIP


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    weight = write(tmp_path, kind, 256)
    assert weight.refusal == ""
    assert weight.is_quantized == (kind != "bfloat16")
    W = weight.read()
    assert W.shape == (256, 256)
    assert bool(torch.isfinite(W).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_peak_memory_is_one_matrix(kind: str) -> None:
    """And a strip of packed values for each thread, a byte each at most; 4 MiB are for scales in float32."""
    row = in_own_process("bench.reading", "measure", "--format", kind, "--size", "4096")
    strips = torch.get_num_threads() * MOST_IN_STRIP / 2**20
    assert row["over MiB"] <= row["stored MiB"] + strips + 4
