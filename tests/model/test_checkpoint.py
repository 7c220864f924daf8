"""The checkpoint reader, on files that safetensors, torch and transformers wrote."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from inilora_kernels.errors import CheckpointError
from inilora_kernels.model.checkpoint import open_checkpoint


def bert(layers: int = 2) -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=36,
            max_position_embeddings=16,
        )
    )


def assert_holds(path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        entry = checkpoint.tensors[name]
        assert entry.dtype == tensor.dtype
        assert entry.shape == tuple(tensor.shape)
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.sha256(name) == stored_sha256(tensor)


def stored_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()


MIXED = {
    "half.weight": torch.randn(5, 3).half(),
    "brain.weight": torch.randn(4, 4).bfloat16(),
    "single.weight": torch.randn(3, 7),
    "double.weight": torch.randn(2, 2, dtype=torch.float64),
    "packed.weight": torch.arange(6, dtype=torch.uint8).reshape(3, 2),
    "counts": torch.arange(4),
    "fp8.weight": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "cube": torch.randn(2, 3, 4),
}


def test_folder_with_one_file(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    assert_holds(tmp_path, model.state_dict())
    config = open_checkpoint(tmp_path).config
    assert config is not None
    assert config["model_type"] == "bert"


def test_folder_with_shards(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_holds(tmp_path, model.state_dict())


def test_bare_file_of_every_dtype(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "any name.safetensors")
    assert_holds(tmp_path / "any name.safetensors", MIXED)
    assert open_checkpoint(tmp_path / "any name.safetensors").config is None


def test_bare_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    config = open_checkpoint(tmp_path / "model.safetensors").config
    assert config is not None
    assert config["hidden_size"] == 24


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


def test_torch_shards(tmp_path: Path) -> None:
    state_dict = bert().state_dict()
    weight_map = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(state_dict)}
    for shard in set(weight_map.values()):
        torch.save({name: state_dict[name] for name in state_dict if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(tmp_path, state_dict)


def test_safetensors_goes_before_torch_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(open_checkpoint(tmp_path).read("weight"), torch.ones(2))


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
@pytest.mark.parametrize(
    ("suffix", "most"),
    [
        ("safetensors", 1.5),
        # A memory map's pages count until it is closed: the tensor and its copy.
        ("bin", 2.5),
    ],
)
def test_peak_memory_is_one_tensor(tmp_path: Path, suffix: str, most: float) -> None:
    """A 512 MiB file is read and hashed, 32 MiB a tensor; the process's own peak says what that took."""
    tensors = {f"big.{i}": torch.full((4096, 2048), float(i)) for i in range(16)}
    tensors["small"] = torch.ones(1)
    path = tmp_path / f"model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    result = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert float(result.stdout) < most * 32


# What is refused


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_missing_path(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    message = refusal(tmp_path)
    assert "no weights here" in message
    assert "found config.json, onnx/" in message
    (empty := tmp_path / "empty").mkdir()
    assert "found an empty folder" in refusal(empty)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    assert "neither a folder nor a .safetensors" in refusal(tmp_path / "model.onnx")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    save_file({"w": torch.ones(50, 50)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    assert "truncated or corrupt" in refusal(tmp_path)


def test_corrupt_safetensors_header(tmp_path: Path) -> None:
    save_file({"w": torch.ones(50, 50)}, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[8:12] = b"\0\0\0\0"
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "truncated or corrupt" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


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


def test_torch_file_that_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save([torch.ones(2)], path)
    assert "holds a list" in refusal(tmp_path)
    torch.save({"epoch": 3, "optimizer": {"w": torch.ones(2)}}, path)
    assert "epoch (int), optimizer (dict)" in refusal(tmp_path)


def sharded(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path / "model.safetensors.index.json"


def test_missing_shard(tmp_path: Path) -> None:
    weight_map = json.loads(sharded(tmp_path).read_text())["weight_map"]
    shard = sorted(set(weight_map.values()))[1]
    (tmp_path / shard).unlink()
    message = refusal(tmp_path)
    assert f"{shard}: shard is missing" in message
    assert next(name for name in weight_map if weight_map[name] == shard) in message


def test_truncated_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    assert f"{shard}: truncated or corrupt" in refusal(tmp_path)


def test_shard_that_lacks_a_tensor(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    shard = content["weight_map"]["pooler.dense.weight"]
    content["weight_map"]["layer.99.weight"] = shard
    index.write_text(json.dumps(content))
    message = refusal(tmp_path)
    assert "layer.99.weight" in message
    assert shard in message


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list"),
        ("{}", "no `weight_map`"),
        ('{"weight_map": {"w": 1}}', "no `weight_map`"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "not in the index's own folder"),
    ],
)
def test_bad_index(tmp_path: Path, index: str, complaint: str) -> None:
    (folder := tmp_path / "model").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert complaint in refusal(folder)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [(b"{'model_type'", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"3", "a JSON int")],
)
def test_bad_config(tmp_path: Path, config: bytes, complaint: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    assert complaint in refusal(tmp_path)


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
    with pytest.raises(CheckpointError, match="cannot read w"):
        checkpoint.read("w")
    (tmp_path / "copy").rename(path)
    assert torch.equal(checkpoint.read("w"), tensors["w"])
