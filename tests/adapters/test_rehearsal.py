"""What PEFT would refuse later is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from inilora_kernels import attach, initialize_peft, lora_model, save_adapter
from inilora_kernels.adapters import rehearsal
from inilora_kernels.adapters.convert import convert, export_merged
from inilora_kernels.adapters.export import export_delta, export_residual
from inilora_kernels.adapters.plan import _all_but
from inilora_kernels.errors import CheckpointError, TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.targets import find_targets

from ..factorized import factorize
from .architectures import DEEPSEEK, EXPERTS, JAMBA, LLAMA4, MAMBA, TEXT
from .models import logits, save, train


def test_another_class_than_the_exported_one_is_an_error_and_no_warning(llama: Path, tmp_path: Path) -> None:
    """LlamaFactory 10294: an adapter whose names match nothing trained a fresh LoRA on R."""
    export_residual(llama, factorize(llama, ("q_proj", "v_proj"), rank=2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"modules were (excluded|targeted)"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert _all_but(["q_proj"]) is None


def test_mambas_modules_that_peft_refuses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save("MambaForCausalLM", tmp_path / "base", **MAMBA)
    with pytest.raises(TargetError, match=r"PEFT does not take these modules.*out_proj"):
        export_residual(base, factorize(base, ("in_proj", "out_proj"), rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(transformers.__version__ < "5", reason="before 5, Jamba calls dt_proj, so an adapter on it works")
@pytest.mark.parametrize("export", [export_residual, export_delta])
def test_a_layer_that_the_model_does_not_call_is_refused_whatever_its_size(
    export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft 761: PEFT takes Jamba's dt_proj, whose weight the mixer reads by itself; in large models too."""
    monkeypatch.setattr(rehearsal, "_LARGEST_RUN", 0)
    base = save("JambaForCausalLM", tmp_path / "base", **JAMBA)
    with pytest.raises(TargetError, match=r"dt_proj: JambaMambaMixer\..* reads its weight and does not call"):
        export(base, factorize(base, ("q_proj", "dt_proj"), rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_residual, export_delta])
def test_a_layer_that_a_fused_kernel_would_bypass_is_refused(export: Callable[..., None], tmp_path: Path) -> None:
    """peft 761: Mamba's x_proj is called on a CPU, and its weight read by a kernel on a GPU, where others may train."""
    base = save("MambaForCausalLM", tmp_path / "base", **MAMBA)
    with pytest.raises(TargetError, match=r"x_proj: MambaMixer\..*forward hands its weight to a fused kernel"):
        export(base, factorize(base, ("in_proj", "x_proj"), rank=2), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    assert torch.equal(logits(lora_model(model, factorize(base, ("in_proj", "x_proj"), rank=2))), expected)


def test_a_router_that_returns_its_choice_is_no_linear_layer(tmp_path: Path) -> None:
    """Llama 4's is a class of nn.Linear, which all-linear took and no LoRA fits: the first step crashed."""
    base = save("Llama4ForCausalLM", tmp_path / "base", **LLAMA4["text_config"])
    with pytest.raises(TargetError, match=r"router cannot get an adapter: .*Llama4Router, no linear layer"):
        export_delta(base, factorize(base, ("q_proj", "router"), rank=2), tmp_path / "out")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["router"]))
    with pytest.raises(TargetError, match=r"Llama4Router returns a tuple"):
        initialize_peft(model, factorize(base, ("router",), rank=2))
    assert not any("router" in target.module for target in find_targets(open_checkpoint(base), "all-linear"))


def test_a_layer_whose_weight_is_read_in_another_branch_alone_is_taken(tmp_path: Path) -> None:
    """Bloom's dense is multiplied slice by slice where pretraining_tp says so, and called otherwise."""
    base = save("BloomForCausalLM", tmp_path / "base", vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    export_delta(base, factorize(base, ("dense",), rank=2), tmp_path / "out")


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {}], ids=["variant", "no index"])
def test_weights_that_transformers_loads_by_their_variant_or_by_an_index_alone(
    options: dict[str, str], llama: Path, tmp_path: Path
) -> None:
    base, model = tmp_path / "base", AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(base, max_shard_size="30KB", **options)
    assert len(list(base.glob("*.safetensors"))) > 1
    if not options:
        (base / "model.safetensors.index.json").unlink()
    factors = factorize(base, ("q_proj", "v_proj"), rank=2)
    export_delta(base, factors, tmp_path / "delta")
    export_residual(base, factors, tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual/base", **options)
    started = PeftModel.from_pretrained(residual, tmp_path / "residual/adapter")
    torch.testing.assert_close(logits(started), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unable to open file: Too many open files (24)")])
@pytest.mark.parametrize("place", [(PeftModel, "from_pretrained"), (transformers.LlamaForCausalLM, "forward")])
def test_a_lack_of_memory_or_files_is_not_blamed_on_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], error: Exception
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    factors = factorize(llama, ("q_proj",))
    monkeypatch.setattr(*place, fail)
    with pytest.raises(CheckpointError, match="ulimit"):
        export_delta(llama, factors, tmp_path / "out")


@pytest.mark.skipif(transformers.__version__ < "5", reason="before 5, PEFT renames nothing of these models")
@pytest.mark.parametrize(
    ("name", "config", "modules", "complaint"),
    [
        (
            "DeepseekV3ForCausalLM",
            {**DEEPSEEK, "n_group": 1, "topk_group": 1},
            ("o_proj", "shared_experts.down_proj"),
            r"makes something else .*experts",
        ),
        ("MambaForCausalLM", MAMBA, ("in_proj", "out_proj"), r"does not take these modules .*out_proj"),
    ],
)
def test_a_converted_lora_that_peft_would_load_elsewhere_is_refused_and_merged(
    name: str, config: dict[str, object], modules: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    """PEFT made parameters of the experts of it, without a word; what was trained by `attach` is not lost."""
    base = save(name, tmp_path / "base", **config)
    factors = factorize(base, modules, rank=2)
    model = attach(AutoModelForCausalLM.from_pretrained(base), factors)
    trained = train(model)
    save_adapter(model, tmp_path / "trained", base)
    with pytest.raises(TargetError, match=rf"PEFT {complaint}.*`inilora merge` writes"):
        convert(tmp_path / "trained", factors, tmp_path / "lora", base)
    assert not (tmp_path / "lora").exists()
    export_merged(tmp_path / "trained", factors, tmp_path / "merged", base)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(transformers, "LagunaConfig"), reason="a newer transformers has Laguna")
def test_a_live_adapter_whose_names_peft_would_lose_is_refused(tmp_path: Path) -> None:
    """PEFT renames the keys of Laguna's shared experts as transformers does a checkpoint's, and finds no module."""
    sizes = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, **EXPERTS, "num_experts": 4}
    base = save("LagunaForCausalLM", tmp_path / "base", **sizes, num_attention_heads_per_layer=[4, 4])
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    with pytest.raises(TargetError, match=r"PEFT saves .*shared_experts\.down_proj under names .*`inilora merge`"):
        lora_model(model, factorize(base, ("o_proj", "shared_expert.down_proj"), rank=2))
    assert torch.equal(logits(model), expected)
    started = lora_model(model, factorize(base, ("o_proj",), rank=2))
    trained = train(started)
    started.save_pretrained(tmp_path / "trained")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "trained")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-5)


def test_a_model_that_draws_what_it_masks_is_compared_with_itself(tmp_path: Path) -> None:
    """ViTMAE's two runs differed by the mask, and an export that adds exactly 0 was refused, or not, by luck."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    base = save("ViTMAEForPreTraining", tmp_path / "base", image_size=16, patch_size=4, **sizes, **decoder)
    factors = factorize(base, ("query", "value", "decoder_pred"), rank=2)
    export_delta(base, factors, tmp_path / "delta")
    export_residual(base, factors, tmp_path / "residual")
