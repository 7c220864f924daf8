"""torch's files: values, views, damage, and code that is never run."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from inilora_kernels.memory import free_memory
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.files import torch_file

from ..checkpoints import MIXED, assert_holds, refusal


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file(tmp_path: Path, zipped: bool) -> None:
    tensors = dict(MIXED)
    if not zipped:  # torch's format before 1.6 knows no 8-bit floats
        del tensors["fp8.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_holds(tmp_path / "pytorch_model.bin", tensors)
    assert_holds(tmp_path, tensors)


def test_torch_file_of_views_reads_and_hashes_the_values(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    views = {"tail": whole[2:], "turned": whole.T, "parameter": torch.nn.Parameter(whole[:1])}
    torch.save(views, tmp_path / "views.bin")
    assert_holds(tmp_path / "views.bin", {name: view.detach() for name, view in views.items()})
    assert open_checkpoint(tmp_path / "views.bin").read("turned").is_contiguous()


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("hostile-code-ran"),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_torch_file_is_refused_and_never_run(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Hostile()}, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "never run" in refusal(tmp_path)
    Path("pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    assert "never run" in refusal(tmp_path)
    assert not Path("hostile-code-ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.95])
def test_truncated_torch_file(tmp_path: Path, zipped: bool, part: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(50, 50)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert "corrupt" in refusal(tmp_path)


def test_a_file_of_the_older_format_beyond_the_free_memory_is_refused(tmp_path: Path) -> None:
    """It can only be read whole; the rest of this one is a hole in the file."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(50, 50)}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, 2 * int(free_memory()))
    assert "format before 1.6" in refusal(tmp_path)


def test_threads_load_a_file_of_the_older_format_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{number}.weight": torch.randn(30, 20) for number in range(24)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path)
    torch_file._load_old.cache_clear()
    loads: list[Path] = []
    load = torch_file._load_checked
    two_at_once = threading.Barrier(2)

    def load_beside_another(file: Path, *rest: Any) -> Any:
        loads.append(file)
        # Whoever is alone goes on in a moment.
        with contextlib.suppress(threading.BrokenBarrierError):
            two_at_once.wait(0.2)
        return load(file, *rest)

    monkeypatch.setattr(torch_file, "_load_checked", load_beside_another)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(checkpoint.read, tensors))
    assert len(loads) == 1
    assert all(map(torch.equal, read, tensors.values()))


def test_torch_file_that_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save([torch.ones(2)], path)
    assert "holds a list" in refusal(tmp_path)
    torch.save({"epoch": 3, "optimizer": {"w": torch.ones(2)}}, path)
    assert "epoch (int), optimizer (dict)" in refusal(tmp_path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes] = lambda _, content: content, **options: int) -> None:
    """The same archive by another writer."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_values_are_read_from_their_place_in_the_file(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.bin", torch.randn(6, 4)
    torch.save({"whole": whole, "tail": whole[2:], "scalar": torch.tensor(3.0), "turned": whole.T}, path)
    tensors = open_checkpoint(path).tensors
    assert {name for name, tensor in tensors.items() if tensor.offset is None} == {"turned"}
    rewritten(path)
    assert_holds(path, {"whole": whole, "tail": whole[2:], "scalar": torch.tensor(3.0), "turned": whole.T})


def test_another_byte_order(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.bin", torch.arange(12).reshape(3, 4)
    torch.save({"whole": whole}, path)

    def swapped(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        return whole.numpy().byteswap().tobytes() if "/data/" in name else content

    rewritten(path, swapped)
    assert_holds(path, {"whole": whole})


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    """torch's memory map of one would be of the compressed bytes."""
    torch.save({"whole": torch.zeros(60, 40)}, tmp_path / "pytorch_model.bin")
    rewritten(tmp_path / "pytorch_model.bin", compression=zipfile.ZIP_DEFLATED)
    assert "is compressed in it" in refusal(tmp_path)


def test_values_that_are_marked_as_negatives(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    torch.save({"negative": torch._neg_view(whole)}, tmp_path / "model.bin")
    assert_holds(tmp_path / "model.bin", {"negative": -whole})


def test_half_of_a_character_in_a_name(tmp_path: Path) -> None:
    """A pickle holds it; the factor file, written after all the work, cannot."""
    torch.save({"\ud800.q_proj.weight": torch.ones(4, 4)}, tmp_path / "pytorch_model.bin")
    assert r"\ud800.q_proj.weight' is no text" in refusal(tmp_path)
