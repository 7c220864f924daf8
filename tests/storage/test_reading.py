"""Files that must not be opened as they are: pipes, devices, links in circles, lengths and counts without an end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from inilora_kernels import FactorSet
from inilora_kernels.adapters.diffusers_folder import read_diffusers
from inilora_kernels.adapters.folder import read_adapter
from inilora_kernels.adapters.model_copy import size_of_copy
from inilora_kernels.errors import CheckpointError, FactorFileError, InitializationError
from inilora_kernels.model.architecture import describe
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets
from inilora_kernels.storage import cache, reading

from .entries import FIRST, example


def model_in(folder: Path) -> Path:
    save_file({"layer.0.query.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("replace", [os.mkfifo, zeros, circle, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_model_with_what_is_no_regular_file(tmp_path: Path, name: str, replace: object) -> None:
    model_in(tmp_path)
    if name.endswith(".index.json"):
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    replace(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["modules.json", "adapter_config.json", "model_index.json"])
def test_a_pipe_in_place_of_a_description(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: a pipe"):
        open_checkpoint(tmp_path)


def test_pipes_in_place_of_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "factors.safetensors")
    os.mkfifo(tmp_path / "query.weight.pt")
    os.mkfifo(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_model.safetensors").touch()
    for read in (
        lambda: FactorSet.load(tmp_path / "factors.safetensors"),
        lambda: FactorSet.load(tmp_path),
        lambda: read_adapter(tmp_path),
    ):
        with pytest.raises(FactorFileError, match="a pipe"):
            read()
    monkeypatch.setenv("INILORA_CACHE", str(tmp_path))
    cache.keep("ab" * 32, example())
    entry = cache.entry_path("ab" * 32)
    assert entry is not None
    assert cache.find("ab" * 32, FIRST) is not None
    entry.unlink()
    os.mkfifo(entry)
    assert cache.find("ab" * 32, FIRST) is None


def test_names_that_no_file_can_have() -> None:
    for path in ("/tmp/" + "x" * 5000, "/tmp/\0"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            open_checkpoint(path)
        with pytest.raises(FactorFileError, match="no such"):
            FactorSet.load(path)


def test_json_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_JSON", 100)
    (tmp_path / "index.json").write_text('{"a": "' + "b" * 100 + '"}')
    with pytest.raises(CheckpointError, match="longer than"):
        reading.read_json(tmp_path / "index.json")
    (tmp_path / "index.json").write_text("[" * 99)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        reading.read_json(tmp_path / "index.json")


def test_a_config_of_far_more_modules_than_there_are_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inilora_kernels.model.aside._MOST_MODULES", 100)
    config = {**json.loads((llama / "config.json").read_text()), "num_hidden_layers": 999_999}
    with pytest.warns(UserWarning, match="more than 120 modules"):
        assert describe(config, ["model.layers.0.self_attn.q_proj"]) is None


def test_a_small_file_that_expands_to_a_large_tensor(tmp_path: Path) -> None:
    torch.save({"query.weight": torch.ones(1).expand(60_000, 60_000)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"query\.weight would take"):
        open_checkpoint(tmp_path).read("query.weight")
    torch.save({"A": torch.ones(1).expand(60_000, 60_000), "B": torch.ones(60_000, 1)}, tmp_path / "query.weight.pt")
    with pytest.raises(FactorFileError, match="would take"):
        FactorSet.load(tmp_path)


def large_safetensors(folder: Path) -> Path:
    header = {
        "small": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "large": {"dtype": "F32", "shape": [1 << 15, 1 << 16], "data_offsets": [16, 16 + (1 << 33)]},
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + torch.ones(4).numpy().tobytes())
        stream.truncate(8 + len(text) + 16 + (1 << 33))
    return folder / "model.safetensors"


def large_torch_file(folder: Path) -> Path:
    torch.save({"small": torch.ones(2, 2), "large": torch.zeros(1 << 13, 1 << 13)}, folder / "model.bin")
    return folder / "model.bin"


def large_gguf(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for add in (writer.add_embedding_length, writer.add_block_count, writer.add_head_count, writer.add_vocab_size):
        add(2)
    writer.add_tensor_info("small", (2, 2), np.dtype(np.float32), 16)
    writer.add_tensor_info("large", (1 << 15, 1 << 16), np.dtype(np.float32), 1 << 33)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    writer.close()
    with (folder / "model.gguf").open("r+b") as stream:
        stream.seek(0, 2)
        begin = -(-stream.tell() // 32) * 32
        stream.truncate(begin + 32 + (1 << 33))
        stream.seek(begin)
        stream.write(torch.ones(4).numpy().tobytes())
    return folder / "model.gguf"


_LIMITED = """
import resource, sys, torch
from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint

open_checkpoint(sys.argv[1]).tensors["small"].read()  # what is imported once is not what is limited
with open("/proc/self/status") as status:
    mapped = int(next(line for line in status if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 27), -1))
checkpoint = open_checkpoint(sys.argv[1])
assert checkpoint.tensors["small"].read().view(torch.float32).sum() == 4
try:
    checkpoint.tensors["large"].read()
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("write", [large_safetensors, large_torch_file, large_gguf])
def test_opening_maps_no_shard(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Under `ulimit -v`, a file beyond the limit is opened, and a matrix that fits is read.

    In a process of its own: a fork of this one has what the tests before it mapped and freed, and none of its threads.
    """
    pytest.importorskip("resource")
    command = [sys.executable, "-c", _LIMITED, str(write(tmp_path))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "large: not enough memory" in run.stdout, run.stderr


def test_a_copy_is_refused_before_it_begins(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model/notes.txt").write_text("x" * 1000)
    size = size_of_copy(open_checkpoint(tmp_path / "model"))
    files = [file.stat().st_size for file in (tmp_path / "model").iterdir()]
    assert 0.9 * sum(files) < size <= sum(files)
    os.mkfifo(tmp_path / "model/notes")
    with pytest.raises(CheckpointError, match="notes: not a regular file"):
        size_of_copy(open_checkpoint(tmp_path / "model"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(4).to_sparse(),
        torch.eye(4, device="meta"),
        torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    ],
)
def test_a_torch_file_whose_tensor_has_no_array_of_values(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"query.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"query\.weight is sparse"):
        open_checkpoint(tmp_path).read("query.weight")
    torch.save({"A": tensor, "B": torch.eye(4)}, tmp_path / "query.weight.pt")
    with pytest.raises(FactorFileError, match="A is sparse"):
        FactorSet.load(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        b"\xff{",
        b'{"quant_type": 5}',
        b'{"dtype": "float32", "shape": 5}',
        b'{"dtype": "float32", "quant_type": "nf4", "blocksize": -3, "shape": [32, 32]}',
    ],
)
def test_a_quantizers_description_that_is_nonsense(tmp_path: Path, state: bytes) -> None:
    tensors = {
        "query.weight": torch.zeros(512, 1, dtype=torch.uint8),
        "query.weight.absmax": torch.ones(16),
        "query.weight.quant_map": torch.ones(16),
        "query.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InitializationError, match="query"):
        find_targets(open_checkpoint(tmp_path), ["query"])[0].read()


def test_without_more_files_to_open_readers_raise_errors_of_ours(llama: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    FactorSet({"q": example()}, {}).save(tmp_path / "factors.safetensors")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig()).save_pretrained(tmp_path / "adapter")
    readers: list[Callable[[], object]] = [
        lambda: [target.read() for target in find_targets(open_checkpoint(llama), ["q_proj"])],
        lambda: FactorSet.load(tmp_path / "factors.safetensors"),
        lambda: read_adapter(tmp_path / "adapter"),
        lambda: read_diffusers(tmp_path / "adapter/adapter_model.safetensors"),
    ]
    for read in readers:
        read()
        process = os.fork()
        if not process:
            free = os.open(os.devnull, os.O_RDONLY)
            os.close(free)
            refused = []
            for limit in range(free, free + 3):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
                try:
                    read()
                except InitializationError:
                    refused.append(limit)
                except BaseException:
                    os._exit(1)
            os._exit(not refused)
        assert os.waitpid(process, 0)[1] == 0


def test_a_working_folder_that_has_been_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(CheckpointError, match="the folder you are in has been removed; change to another one"):
        reading.absolute(Path("factors.safetensors"))
    assert reading.absolute(tmp_path) == tmp_path.resolve()
