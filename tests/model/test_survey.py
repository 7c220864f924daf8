"""One pass over each matrix: its hash, and weights at the ends of float32."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inilora_kernels import approximate
from inilora_kernels.display.progress import ProgressBar
from inilora_kernels.errors import WeightError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.in_memory import target_in_memory
from inilora_kernels.model.survey import survey, surveyed_together, together
from inilora_kernels.model.targets import Target, find_targets

from ..matrices import W


@pytest.mark.parametrize("scale", [1e200, 3e38, 1e-200])
def test_weights_beyond_float32(scale: float) -> None:
    with pytest.raises(WeightError, match="float32, in which factors are stored"):
        approximate(scale * W, 2, solver="krylov")


@pytest.mark.parametrize("solver", ["krylov", "exact"])
@pytest.mark.parametrize("scale", [3e37, 1e-35])
def test_weights_at_the_ends_of_float32(scale: float, solver: str) -> None:
    factors = approximate((scale * W).float(), 2, solver=solver)
    assert factors.A.isfinite().all()
    assert factors.B.isfinite().all()
    assert factors.certificate.excess < 1e-6


def test_a_matrix_is_read_once(tmp_path: Path) -> None:
    """Hashed from memory, with the hash of its file; an expert, which may have to be dequantized, likewise."""
    tensors = {"a.q_proj.weight": torch.randn(8, 6), "layers.0.experts.down_proj": torch.randn(3, 4, 6)}
    save_file(tensors, tmp_path / "model.safetensors")
    targets = find_targets(open_checkpoint(tmp_path), ["q_proj"], None, ["down_proj"])
    reads: list[str] = []

    def counted(target: Target) -> Target:
        def read() -> Tensor:
            reads.append(target.module)
            return target.read()

        return dataclasses.replace(target, read=read, sha256=lambda: "read again")

    with ProgressBar(False) as bar:
        found = survey([counted(target) for target in targets], bar)
    assert [one.hash for one in found] == [target.sha256() for target in targets]
    assert sorted(reads) == sorted(target.module for target in targets)
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("shape", "dtype", "on_two", "on_sixteen"),
    [
        ((4096, 4096), torch.bfloat16, 2, 16),
        ((4096, 4096), torch.float32, 1, 8),
        ((14336, 4096), torch.bfloat16, 2, 4),
        ((384, 384), torch.float32, 2, 16),
        ((53248, 16384), torch.bfloat16, 2, 2),
    ],
)
def test_a_gpus_host_hashes_with_all_its_threads(
    shape: tuple[int, int], dtype: torch.dtype, on_two: int, on_sixteen: int
) -> None:
    """LLaMA2-7B's 2.15 GB, hashed two matrices at a time, are a tenth of its run on a GPU."""
    read = torch.empty(0)
    target = Target("q", "query", shape, dtype, lambda: read, lambda: "")
    assert [surveyed_together(target, threads) for threads in (2, 16)] == [on_two, on_sixteen]
    # Two threads hold no more than they do elsewhere.
    assert together(target, 2) == on_two


def test_the_hash_of_a_matrix_in_memory_need_not_be_waited_for() -> None:
    """It is begun on another thread, where there is one."""
    begun, goes_on = threading.Event(), threading.Event()

    def sha256() -> str:
        begun.set()
        assert goes_on.wait(60)
        return "ab"

    target = dataclasses.replace(target_in_memory("q", torch.randn(8, 6)), sha256=sha256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ProgressBar(False) as bar:
            [found] = survey([target], bar, in_memory=True)
        assert begun.wait(60)
        goes_on.set()
        assert callable(found.hash)
        assert found.hash() == "ab" == found.hash()
    finally:
        torch.set_num_threads(threads)
