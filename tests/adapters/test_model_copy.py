"""Copies of a model's folder with a few weights changed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaForCausalLM

from inilora_kernels.adapters import model_copy
from inilora_kernels.adapters.convert import export_merged
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.errors import CheckpointError
from inilora_kernels.factor_set import FactorSet
from inilora_kernels.model.checkpoint import open_checkpoint

from ..factorized import factorize
from .models import files, logits, output


def test_only_the_targets_change_in_the_residual(minilm: Path, sharded: Path, tmp_path: Path) -> None:
    factors = factorize(sharded)
    export_residual(sharded, factors, tmp_path / "out")
    before, after = files(sharded), files(tmp_path / "out/base")
    assert after.keys() - before.keys() == {"inilora_residual.json"}
    assert before.keys() <= after.keys()
    assert all(after[name] == before[name] for name in before if not name.endswith(".safetensors"))
    source, residual = open_checkpoint(sharded), open_checkpoint(tmp_path / "out/base")
    assert {name: (entry.file.name, entry.offset, entry.dtype) for name, entry in source.tensors.items()} == {
        name: (entry.file.name, entry.offset, entry.dtype) for name, entry in residual.tensors.items()
    }
    for name in source.tensors:
        W, R = source.read(name), residual.read(name)
        if (module := name.removesuffix(".weight")) in factors:
            assert torch.equal(R, (W.float() - factors[module].product()).bfloat16())
        else:
            assert torch.equal(W, R), name


def test_a_torch_bin_becomes_safetensors(minilm: Path, minilm_factors: FactorSet, tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((minilm / "config.json").read_bytes())
    tensors = load_file(minilm / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard, half in (("1", names[:50]), ("2", names[50:])):
        file = f"pytorch_model-0000{shard}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, source / file)
        weight_map.update(dict.fromkeys(half, file))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export_residual(source, minilm_factors, tmp_path / "out")
    assert sorted(files(tmp_path / "out/base")) == [
        "config.json",
        "inilora_residual.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    base = AutoModel.from_pretrained(tmp_path / "out/base")
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
    assert (output(model) - output(AutoModel.from_pretrained(minilm))).abs().max() < 2e-5


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_becomes_safetensors(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path, inner: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((minilm / "config.json").read_bytes())
    model = load_file(minilm / "model.safetensors")
    dcp.save({"model": model}, checkpoint_id=source / inner, no_dist=True)
    if inner:
        dcp.save({"step": torch.ones(1)}, checkpoint_id=source / "optimizer_0", no_dist=True)
    export_residual(source, minilm_factors, tmp_path / "out")
    assert sorted(files(tmp_path / "out/base")) == ["config.json", "inilora_residual.json", "model.safetensors"]
    assert not (tmp_path / "out/base/optimizer_0").exists()
    written = load_file(tmp_path / "out/base/model.safetensors")
    changed = {name for name in model if not torch.equal(written[name], model[name])}
    assert changed == {f"{module}.weight" for module in minilm_factors}


@pytest.mark.parametrize("strip_bytes", [100, 1 << 20])
def test_weights_are_changed_strip_by_strip(
    gpt2: Path, gpt2_factors: FactorSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip_bytes: int
) -> None:
    """Rows of one matrix at a time, transposed and fused, whose parts begin and end within strips."""
    monkeypatch.setattr(model_copy, "_STRIP_BYTES", strip_bytes)
    export_residual(gpt2, gpt2_factors, tmp_path / "out")
    name = "transformer.h.1.attn.c_attn"
    W, R = (open_checkpoint(folder).read(f"{name}.weight") for folder in (gpt2, tmp_path / "out/base"))
    expected = W.clone()
    for part in ("query", "value"):
        one = gpt2_factors[f"{name}:{part}"]
        expected[:, slice(*(one.rows or ()))] -= one.product().T
    assert torch.allclose(R, expected, rtol=0, atol=1e-6)
    adapter = tmp_path / "out/adapter/adapter_model.safetensors"
    tensors = load_file(adapter)
    save_file({key: one * 1.5 if "lora_B" in key else one for key, one in tensors.items()}, adapter)
    config = tmp_path / "out/adapter/adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "out/base")})
    )
    export_merged(tmp_path / "out/adapter", gpt2_factors, tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged").read(f"{name}.weight")
    assert torch.allclose(merged, W + 0.5 * (W - R), rtol=0, atol=1e-5)


def loads_as(base: Path, out: Path, model: LlamaForCausalLM) -> bool:
    """Whether a residual's two folders give the output of a model, by what PEFT and transformers load."""
    export_residual(base, factorize(base, ("q_proj",)), out)
    residual = LlamaForCausalLM.from_pretrained(out / "base")
    return torch.allclose(logits(PeftModel.from_pretrained(residual, out / "adapter")), logits(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*adapter_config.json is beside the model")
def test_an_adapter_beside_the_model_is_left_behind(llama: Path, tmp_path: Path) -> None:
    """Its weights are, and transformers then loaded nothing."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    export_delta(llama, factorize(llama, ("q_proj",)), tmp_path / "delta")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "delta/adapter" / name, base)
    assert loads_as(base, tmp_path / "out", LlamaForCausalLM.from_pretrained(llama))
    assert not (tmp_path / "out/base/adapter_config.json").exists()


@pytest.mark.skipif(transformers.__version__ < "5", reason="before 5, transformers takes no such name")
def test_weights_that_config_json_names(llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tensors = load_file((base / "model.safetensors").rename(base / "real.safetensors"))
    save_file({name: 0 * one for name, one in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "real.safetensors"}))
    assert loads_as(base, tmp_path / "out", LlamaForCausalLM.from_pretrained(llama))


@pytest.mark.parametrize("kind", ["pipe", "loop", "elsewhere", "nowhere"])
def test_a_copy_that_would_not_end_is_refused(
    minilm: Path, minilm_factors: FactorSet, tmp_path: Path, kind: str
) -> None:
    model, bad = tmp_path / "model", tmp_path / "model" / "more" / "notes"
    shutil.copytree(minilm, model)
    bad.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.symlink_to({"loop": "..", "elsewhere": "/proc", "nowhere": "missing"}[kind])
    with pytest.raises(CheckpointError, match=r"notes: .*remove it"):
        export_residual(model, minilm_factors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_told(llama: Path, tmp_path: Path) -> None:
    """What a stranger's model links to would be uploaded with the copy."""
    base, secret = Path(shutil.copytree(llama, tmp_path / "base")), tmp_path / "secret"
    secret.write_text("mine")
    (base / "notes.txt").symlink_to(secret)
    (base / "again.json").symlink_to("config.json")
    blob = tmp_path / "hub/models--org--tiny/blobs/0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("a file of a download")
    (base / "README.md").symlink_to(blob)
    with pytest.warns(UserWarning, match=f"base: notes.txt → {secret}: links out of the model's folder"):
        export_residual(base, factorize(base, ("q_proj",)), tmp_path / "out")


def test_a_read_only_model_is_copied_and_changed(llama: Path, tmp_path: Path) -> None:
    """Models are often installed read-only, for all users; the copy's modes follow the umask."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")
    for path in (*base.rglob("*"), base):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = os.umask(0o022)
    try:
        export_residual(base, factorize(base, ("q_proj",)), tmp_path / "out")
    finally:
        os.umask(before)
        for path in (base, base / "1_Pooling"):
            path.chmod(0o755)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {0o755, 0o644}
    assert (tmp_path / "out/base/1_Pooling/config.json").is_file()
