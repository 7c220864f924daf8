"""Checkpoints of torch.distributed, and metadata that would run code."""

from __future__ import annotations

import contextlib
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint

from ..checkpoints import TENSORS, holds, refusal


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint(tmp_path: Path, inner: str) -> None:
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / inner, no_dist=True)
    assert holds(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "layers.0.q_proj.weight"
    assert torch.equal(checkpoint.read(name, slice(1, 3)), TENSORS[name][1:3])
    save_file(TENSORS, tmp_path.parent / f"{tmp_path.name}.safetensors")
    same = open_checkpoint(tmp_path.parent / f"{tmp_path.name}.safetensors")
    assert checkpoint.sha256(name) == same.sha256(name)


def test_threads_that_read_it_leave_the_warnings_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{number}.weight": torch.randn(30, 20) for number in range(24)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = open_checkpoint(tmp_path)
    all_at_once, load = threading.Barrier(4), dcp.load

    def load_among_others(*arguments: Any, **options: Any) -> None:
        # Whoever is alone goes on in a moment, and so do all that follow.
        with contextlib.suppress(threading.BrokenBarrierError):
            all_at_once.wait(0.2)
        load(*arguments, **options)

    monkeypatch.setattr(dcp, "load", load_among_others)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(checkpoint.read, tensors))
    assert list(warnings.filters) == before
    assert all(map(torch.equal, read, tensors.values()))


@pytest.mark.parametrize(
    ("nested", "around"),
    [
        ({"model": TENSORS}, {}),
        ({"model": TENSORS}, {"optimizer": {"state": {"layers.0.q_proj.weight": {"exp_avg": torch.ones(4)}}}}),
        ({"app": {"model": TENSORS}}, {"app": {"optim": {"state": {"step": torch.ones(1)}}}}),
        (TENSORS, {"optimizer": {"state": {"step": torch.ones(1)}}}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_model_among_what_a_trainer_saves(tmp_path: Path, nested: Any, around: Any) -> None:
    """As accelerate saves FSDP's shards, torch's examples, and torchtitan."""
    (tmp_path / "optimizer_0").mkdir()
    dcp.save({"state": {"step": torch.ones(1)}}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    saved = {key: {**value, **around.get(key, {})} if key == "app" else value for key, value in nested.items()}
    dcp.save({**around, **saved}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    assert holds(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_several_models(tmp_path: Path) -> None:
    for name in ("one", "other"):
        dcp.save(dict(TENSORS), checkpoint_id=tmp_path / name, no_dist=True)
    assert "several distributed checkpoints (one, other)" in refusal(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return (Path.touch, (Path("hostile-code-ran"),))


@pytest.mark.filterwarnings("ignore")
def test_code_in_distributed_metadata_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / "model", no_dist=True)
    (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    assert "more than torch's description" in refusal(tmp_path / "model")
    assert not Path("hostile-code-ran").exists()


@pytest.mark.parametrize("keep", [0, 3000])
@pytest.mark.filterwarnings("ignore")
def test_a_part_cut_short(tmp_path: Path, keep: int) -> None:
    """torch raises a CheckpointException, which is no Exception."""
    dcp.save({"query.weight": torch.ones(64, 64)}, checkpoint_id=tmp_path / "model", no_dist=True)
    (part,) = (tmp_path / "model").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read query\.weight .*write them again"):
        open_checkpoint(tmp_path / "model").read("query.weight")
