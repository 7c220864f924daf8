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
from inilora_kernels.errors import CheckpointError, WeightError
from inilora_kernels.kernels.cpu import sha256 as lanes
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.files import tensor as tensor_file
from inilora_kernels.model.in_memory import target_in_memory
from inilora_kernels.model.survey import Surveyed, survey, surveyed_together, together
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


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A file of matrices of several shapes and dtypes, and of experts, which are no matrices' bytes as they lie."""
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        f"{number}.q_proj.weight": torch.randn(shape, generator=drawn).to(dtype)
        for number, (shape, dtype) in enumerate(
            (shape, dtype)
            for shape in [(40, 70), (300, 9), (1, 64), (128, 128)]
            for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        )
    }
    tensors["layers.0.experts.down_proj"] = torch.randn(3, 4, 6, generator=drawn)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def surveyed(targets: list[Target], *, in_memory: bool = False) -> list[Surveyed]:
    with ProgressBar(False) as bar:
        return survey(targets, bar, in_memory=in_memory)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are hashed together, whatever this processor has, and read in small blocks of rows."""
    monkeypatch.setattr(lanes, "pays", lambda messages, size: messages > 1)
    monkeypatch.setattr(tensor_file, "_BLOCK", 4096)


@pytest.mark.usefixtures("in_blocks")
def test_hashed_together_or_one_by_one(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hash, deviation and energy, to the last bit; of the file, and of the same matrices in memory."""
    targets = find_targets(open_checkpoint(many), ["q_proj"], None, ["down_proj"])
    assert [one.blocks is None for one in targets] == 16 * [False] + 3 * [True]
    together = surveyed(
        [
            one if one.blocks is None else dataclasses.replace(one, read=lambda: pytest.fail("read whole"))
            for one in targets
        ]
    )
    in_memory = [target_in_memory(one.module, one.read()) for one in targets]
    assert surveyed(in_memory, in_memory=True) == together
    monkeypatch.setattr(lanes, "pays", lambda messages, size: False)
    assert surveyed(targets) == together


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), 3e38])
def test_an_entry_that_is_refused_among_many(spoiled: float, many: Path) -> None:
    targets = find_targets(open_checkpoint(many), ["q_proj"])
    W = targets[4].read().float()
    W[299, 8] = spoiled
    targets[4] = target_in_memory("the one", W)
    with pytest.raises(WeightError, match=r"the one: .*(NaN or Inf, the first at \(299, 8\)|no room in float32)"):
        surveyed(targets)


@pytest.mark.usefixtures("in_blocks")
def test_a_file_that_is_cut_while_it_is_read(many: Path) -> None:
    targets = find_targets(open_checkpoint(many), ["q_proj"])
    file = many / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        surveyed(targets)


@pytest.mark.usefixtures("in_blocks")
def test_rows_too_long_to_hold_several_of(many: Path) -> None:
    """Of many matrices at a time; they are read whole, one by one."""
    long = [target_in_memory(f"long {number}", torch.randn(2, 1 << 16)) for number in range(3)]
    short = find_targets(open_checkpoint(many), ["q_proj"])
    found = surveyed([*long, *short])
    assert [one.hash for one in found] == [target.sha256() for target in [*long, *short]]
