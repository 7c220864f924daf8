"""The checkpoint reader, on files that safetensors, torch and transformers wrote."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from inilora_kernels.model.checkpoint import open_checkpoint

from ..factorized import factorize
from .checkpoints import assert_holds, refusal


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


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0.q_proj.base_layer.weight", "0.q_proj.lora_A.default.weight"], "a model with adapters in it"),
        (["base_model.model.0.q_proj.lora_A.weight"], "an adapter, not a model"),
        (["blk.0.attn_q.weight.lora_a"], "an adapter, not a model"),
    ],
)
def test_adapters_in_a_weight_file(tmp_path: Path, names: list[str], said: str) -> None:
    """A PeftModel's state dict: all-linear took lora_A for a layer of the model."""
    save_file({name: torch.ones(4, 4) for name in [*names, "0.k_proj.weight"]}, tmp_path / "model.safetensors")
    assert said in refusal(tmp_path)


def test_a_factor_file_is_no_model(llama: Path, tmp_path: Path) -> None:
    factorize(llama, ("q_proj",)).save(tmp_path / "factors.safetensors")
    assert "a factor file, not a model" in refusal(tmp_path / "factors.safetensors")


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


def test_bare_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    config = open_checkpoint(tmp_path / "model.safetensors").config
    assert config is not None
    assert config["hidden_size"] == 24


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


# What is refused


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


def sharded(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path / "model.safetensors.index.json"


def test_missing_shard(tmp_path: Path) -> None:
    weight_map = json.loads(sharded(tmp_path).read_text())["weight_map"]
    shard = sorted(set(weight_map.values()))[1]
    (tmp_path / shard).unlink()
    message = refusal(tmp_path)
    assert f"{shard}: this shard is missing" in message
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


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_second_copy_of_a_tensor_in_another_shard(tmp_path: Path, where: str) -> None:
    """transformers loads the last shard's, the index names this one's."""
    weight_map = json.loads(sharded(tmp_path).read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    name = next(name for name in weight_map if weight_map[name] == shards[1])
    stale = tmp_path / (shards[0] if where == "before" else shards[-1])
    tensors = load_file(stale)
    save_file({**tensors, name: torch.zeros_like(open_checkpoint(tmp_path).read(name))}, stale, {"format": "pt"})
    message = refusal(tmp_path)
    assert f"{stale}: {name} are in this shard too" in message
    assert "remove the copy" in message


def test_a_tensor_that_the_index_forgot_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["pooler.dense.weight"]
    index.write_text(json.dumps(content))
    assert_holds(tmp_path, BertModel.from_pretrained(tmp_path).state_dict())


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_a_pipe_in_place_of_weights_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "a pipe" in refusal(tmp_path)
    assert "a pipe" in refusal(tmp_path / name)
