"""The hashes of many tensors, in the lanes of a vector or one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels.errors import CheckpointError
from inilora_kernels.kernels.cpu import sha256
from inilora_kernels.model import hashes
from inilora_kernels.model.checkpoint import Checkpoint, open_checkpoint
from inilora_kernels.model.files import tensor as tensor_file
from inilora_kernels.model.files.tensor import size_of
from inilora_kernels.model.hashes import Hashed, hash_in_lanes, in_lanes

SHAPES = {"a": (300, 700), "b": (1, 9), "c": (33, 1), "d": (2000, 300), "e": (7,), "f": (3, 4, 5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)


@pytest.fixture(autouse=True)
def lanes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_BLOCK", 1 << 14)
    monkeypatch.setattr(sha256, "pays", lambda messages, size: messages > 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{number}": torch.randn(shape, generator=drawn).mul(50).to(dtype)
        for name, shape in SHAPES.items()
        for number, dtype in enumerate(DTYPES)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(("threads", "lanes"), [(1, 8), (2, 6), (5, 5)])
def test_every_tensor_of_a_file(checkpoint: Checkpoint, threads: int, lanes: int) -> None:
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    items = [Hashed(name, size_of(tensor.shape, tensor.dtype), tensor.blocks) for name, tensor in tensors.items()]
    found: dict[str, str] = {}
    hash_in_lanes(items, lanes, threads, found.__setitem__)
    assert found == {name: tensor.sha256() for name, tensor in tensors.items()}


@pytest.mark.parametrize("pays", [True, False])
def test_a_checkpoint_hashes_each(checkpoint: Checkpoint, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sha256, "pays", lambda messages, size: pays)
    names = list(checkpoint.tensors)[3:]
    found: list[tuple[str, str]] = []
    checkpoint.hash_each(names, lambda *one: found.append(one))
    assert sorted(found) == sorted((name, checkpoint.sha256(name)) for name in names)


def test_what_its_finder_raises_ends_it(checkpoint: Checkpoint) -> None:
    def refuse(name: str, sha256: str) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match=r"\.\d"):
        checkpoint.hash_each(checkpoint.tensors, refuse)


def test_a_file_that_was_cut_meanwhile(checkpoint: Checkpoint) -> None:
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        checkpoint.hash_each(checkpoint.tensors, lambda name, sha256: None)


def test_tensors_without_axes_and_without_entries(tmp_path: Path) -> None:
    save_file({str(n): torch.full((0, 3) if n % 2 else (), n) for n in range(9)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    found: dict[str, str] = {}
    opened.hash_each(opened.tensors, found.__setitem__)
    assert found == {name: opened.sha256(name) for name in opened.tensors}


def test_no_more_files_are_open_than_the_process_may(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Hashed(str(place), 1 << 30, list) for place in range(64)]
    assert in_lanes(items, threads=8) == 8
    monkeypatch.setattr(hashes, "_open_files", lambda: 16)
    assert in_lanes(items, threads=8) == 2
    assert in_lanes(items, threads=20) == 0


@pytest.mark.parametrize(("soft", "expected"), [(-1, 128), (1024, 256), (40, 10)])
def test_a_quarter_of_the_files_that_may_be_open(soft: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY if soft < 0 else soft, soft))
    assert hashes._open_files() == expected


def test_one_that_is_larger_than_all_others_is_hashed_alone() -> None:
    items = [Hashed(str(place), 1 << 16, list) for place in range(60)]
    assert in_lanes(items, threads=2) == 8
    assert in_lanes([*items, Hashed("large", 1 << 26, list)], threads=2) == 0


def test_few_are_hashed_one_by_one() -> None:
    items = [Hashed(str(place), 1 << 30, list) for place in range(4)]
    assert in_lanes(items[:1], threads=1) == 0
    assert in_lanes(items, threads=4) == 0
    assert in_lanes(items, threads=2) == 2
