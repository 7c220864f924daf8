"""The set for a model: saved and read again, damaged, at a step, and by incomplete names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from inilora_kernels import (
    Certificate,
    Factors,
    FactorSet,
    InitializationError,
    attach,
    convert,
    export_delta,
    export_merged,
    initialize_peft,
    lora_config_of,
    lora_model,
)
from inilora_kernels.errors import FactorFileError, OptionError, OutputError

from .factorized import factorize


def example() -> FactorSet:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query = Factors(
        A=normal(2, 5),
        B=normal(7, 2),
        certificate=Certificate(loss=1.25, optimum=1.0, energy=3.0, steps=10),
        source_sha256="ab" * 32,
        rows=(7, 14),
        transposed=True,
        history=((1, 2.0), (5, 1.5), (10, 1.25)),
        checkpoints={5: (normal(2, 5), normal(7, 2))},
    )
    value = Factors(normal(2, 5), normal(3, 2), Certificate(0.5, 0.5, 1.0, 10), source_sha256="cd" * 32)
    return FactorSet({"h.0.attn.c_attn:query": query, "h.0.value": value}, {"method": "inilora", "rank": 2})


def test_a_saved_set_comes_back_the_same(tmp_path: Path) -> None:
    saved, path = example(), tmp_path / "factors.safetensors"
    saved.save(path)
    loaded = FactorSet.load(path)
    assert list(loaded) == list(saved)
    assert loaded.options == saved.options
    for name, one in saved.items():
        other = loaded[name]
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
        assert one.certificate == other.certificate
        assert (one.rows, one.transposed, one.history) == (other.rows, other.transposed, other.history)
        assert one.checkpoints.keys() == other.checkpoints.keys()
    assert loaded.to_bytes() == path.read_bytes()


def test_keys_are_pefts(tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    example().save(path)
    tensors = load_file(path)
    assert tensors["h.0.value.lora_A.weight"].shape == (2, 5)
    assert tensors["h.0.value.lora_B.weight"].shape == (3, 2)
    with safe_open(path, framework="pt") as reader:
        header = json.loads(reader.metadata()["inilora_kernels"])
    assert header["modules"]["h.0.value"]["source_sha256"] == "cd" * 32
    assert header["modules"]["h.0.value"]["excess"] == 0.0


def test_at_step(tmp_path: Path) -> None:
    kept = FactorSet({"h.0.attn.c_attn:query": example()["h.0.attn.c_attn:query"]}, {})
    then = kept.at_step(5)["h.0.attn.c_attn:query"]
    assert torch.equal(then.A, kept["h.0.attn.c_attn:query"].checkpoints[5][0])
    assert then.certificate == Certificate(loss=1.5, optimum=1.0, energy=3.0, steps=5)
    with pytest.raises(OptionError, match=r"h\.0\.value.*step 5"):
        example().at_step(5)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "factors.safetensors"
    path.write_bytes(example().to_bytes()[:cut])
    with pytest.raises(FactorFileError, match=str(path)):
        FactorSet.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FactorFileError, match="no such"):
        FactorSet.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FactorFileError, match="without factors in it"):
        FactorSet.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"inilora_kernels": '{"format_version": 99}'})
    with pytest.raises(FactorFileError, match="format 99"):
        FactorSet.load(path)
    save_file(
        {"w": torch.zeros(2)}, path, {"inilora_kernels": '{"format_version": 1, "options": {}, "modules": {"m": {}}}'}
    )
    with pytest.raises(FactorFileError, match="damaged"):
        FactorSet.load(path)


def test_an_unwritable_place_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        example().save(tmp_path / "nowhere" / "factors.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken"):
        example().save(tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    assert not list((tmp_path / "taken").iterdir())


def test_factors_by_an_incomplete_name(minilm_factors: FactorSet) -> None:
    with pytest.raises(KeyError) as unknown:
        minilm_factors["query"]
    assert str(unknown.value) == (
        "no factors for 'query' among 12 matrices; encoder.layer.0.attention.self.query, "
        "encoder.layer.1.attention.self.query, encoder.layer.2.attention.self.query and 3 more end in that name"
    )
    with pytest.raises(InitializationError, match=r'did you mean "encoder.layer.0.attention.self.query"'):
        minilm_factors["encoder.layer.0.attention.self.quary"]
    assert minilm_factors.get("query") is None
    assert "query" not in minilm_factors


def test_factors_by_their_path(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    factorize(llama, ("q_proj", "v_proj"), rank=2).save(path)
    ids = torch.arange(6)[None]

    def load() -> Any:
        return LlamaForCausalLM.from_pretrained(llama).eval()

    expected = load()(ids).logits
    config = lora_config_of(load(), path)
    for started in (
        attach(load(), path),
        attach(load(), str(path)),
        initialize_peft(get_peft_model(load(), config), path),
        lora_model(load(), path),
    ):
        assert torch.equal(started(ids).logits, expected)
    export_delta(llama, path, tmp_path / "delta")
    convert(tmp_path / "delta" / "adapter", path, tmp_path / "lora")
    export_merged(tmp_path / "delta" / "adapter", str(path), tmp_path / "merged")
    for given in ({"q_proj": torch.eye(2)}, None, torch.eye(2)):
        with pytest.raises(InitializationError, match=f"was given a {type(given).__name__}; give what approximate_mod"):
            attach(load(), given)  # type: ignore[arg-type]
