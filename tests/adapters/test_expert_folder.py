"""Experts in PEFT's folders: exported, trained, converted to a plain LoRA, merged into the model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from inilora_kernels import FactorSet, convert, export_delta, export_merged, export_residual, load_delta
from inilora_kernels.errors import FactorFileError, OptionError
from inilora_kernels.lora_start import lora_model

from ..mixtures import CONFIGS, factorized, logits, mixture, saved, train


@pytest.mark.parametrize("kind", CONFIGS)
def test_from_a_folder_through_training_by_peft_to_a_plain_lora_and_a_merged_model(kind: str, tmp_path: Path) -> None:
    base = saved(kind, tmp_path / "base")
    factors = factorized(base)
    export_delta(base, factors, tmp_path / "delta", lora_alpha=4)
    model = load_delta(AutoModelForCausalLM.from_pretrained(base), tmp_path / "delta")
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    assert torch.equal(logits(model), expected)
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path / "trained")
    again = load_delta(AutoModelForCausalLM.from_pretrained(base), tmp_path / "trained")
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))
    near = {"rtol": 0.0, "atol": 1e-5 * float(trained.abs().max())}

    assert set(convert(tmp_path / "trained", factors, tmp_path / "plain").values()) == {0.0}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), trained, **near)
    assert max(convert(tmp_path / "trained", factors, tmp_path / "small", rank=3).values()) < 0.9

    export_merged(tmp_path / "trained", factors, tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained, **near)
    assert not torch.allclose(trained, expected, **near)


def test_plain_peft_trains_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path / "base")
    export_delta(base, factorized(base), tmp_path / "delta")
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "delta/adapter", is_trainable=True
    )
    assert torch.equal(logits(model), expected)
    train(model)
    trained = logits(model)
    assert not torch.allclose(trained, expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", factorized(base), tmp_path / "plain")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))


def test_folders_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path / "base")
    factors = factorized(base)
    with pytest.raises(OptionError, match="use export_delta"):
        export_residual(base, factors, tmp_path / "out")
    with pytest.raises(OptionError, match="no dropout for experts"):
        export_delta(base, factors, tmp_path / "out", lora_dropout=0.1)
    lora_model(mixture("mixtral"), factors).save_pretrained(tmp_path / "trained")
    config = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    (tmp_path / "trained/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    down = factorized(base, target_parameters=["experts.down_proj"])
    with pytest.raises(FactorFileError, match="give the factors that it started from"):
        convert(tmp_path / "trained", down, tmp_path / "out")
    few = FactorSet({name: one for name, one in factors.items() if not name.endswith(":2")}, factors.options)
    with pytest.raises(FactorFileError, match="has 3 experts, and there are factors for 2"):
        convert(tmp_path / "trained", few, tmp_path / "out")
    other = saved("mixtral", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FactorFileError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is not the weight"):
        export_delta(other, factors, tmp_path / "out")
    assert not (tmp_path / "out").exists()
