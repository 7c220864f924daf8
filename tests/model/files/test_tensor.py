"""Tensors read by rows and hashed by chunks, whatever file they stand in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint

from ..checkpoints import stored_sha256


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_rows_are_read_alone(tmp_path: Path, suffix: str) -> None:
    whole = torch.randn(9, 5)
    path = tmp_path / f"model.{suffix}"
    save_file({"w": whole}, path) if suffix == "safetensors" else torch.save({"w": whole}, path)
    part = open_checkpoint(path).read("w", slice(2, 6))
    assert torch.equal(part, whole[2:6])
    assert part.untyped_storage().nbytes() == part.nbytes


def test_sha256_of_a_tensor_longer_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 11)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr("inilora_kernels.model.files.tensor._HASH_CHUNK", 200)
    assert open_checkpoint(tmp_path).sha256("w") == stored_sha256(tensor)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_reading_outlives_the_file(tmp_path: Path, suffix: str) -> None:
    """What was read is in its own memory: the file may be overwritten afterwards."""
    path = tmp_path / f"model.{suffix}"
    tensors = {"w": torch.ones(64, 64)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    read = open_checkpoint(path).read("w")
    with path.open("r+b") as stream:
        stream.write(b"\xff" * path.stat().st_size)
    assert torch.equal(read, torch.ones(64, 64))


# Linux forgets a process's high-water mark when asked, so what importing torch took does not hide the rest.
PEAK = """
import sys
from pathlib import Path
from inilora_kernels.model.checkpoint import open_checkpoint

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.read("small")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
for i in range(16):
    checkpoint.read(f"big.{i}")
    checkpoint.sha256(f"big.{i}")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peak_memory_is_one_tensor(tmp_path: Path, suffix: str) -> None:
    """A 512 MiB file is read and hashed, 32 MiB a tensor; the process's own peak says what that took."""
    tensors = {f"big.{i}": torch.full((4096, 2048), float(i)) for i in range(16)}
    tensors["small"] = torch.ones(1)
    path = tmp_path / f"model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    result = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.5 * 32


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_file_that_changes_after_opening(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    tensors = {"w": torch.ones(50, 50)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    checkpoint = open_checkpoint(path)
    shutil.copy(path, tmp_path / "copy")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="model"):
        checkpoint.read("w")
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.read("w")
    (tmp_path / "copy").rename(path)
    assert torch.equal(checkpoint.read("w"), tensors["w"])
