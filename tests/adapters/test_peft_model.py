"""What other programs do with a PeftModel that started from factors: copy, save, load, resume, disable and merge it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.peft import initialize_peft
from inilora_kernels.choices import Form
from inilora_kernels.errors import FactorFileError, OptionError
from inilora_kernels.factor_set import FactorSet

from ..factorized import factorize, inilora_alpha
from .started import FORMS, TARGETS, change, load, logits, started


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {}, "alpha_pattern": {"q_proj": 2}}])
def test_what_it_saves_is_a_plain_lora_for_the_original_base(
    llama: Path, factors: FactorSet, form: Form, options: dict[str, object], tmp_path: Path
) -> None:
    """peft 1929: A and B alone, taken for a LoRA of W, add W's own low-rank part."""
    model = started(llama, factors, form, **options)
    trained = change(model)
    model.save_pretrained(tmp_path / "trained")
    assert torch.allclose(
        logits(PeftModel.from_pretrained(load(llama), tmp_path / "trained")), trained, rtol=0, atol=1e-5
    )
    convert(tmp_path / "trained", factors, tmp_path / "lora", base=llama)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path / "lora")), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_it_pushes_to_the_hub_is_what_it_saves(
    llama: Path, factors: FactorSet, form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = tmp_path / "pushed"
    pushed.mkdir()

    def create_commit(_: HfApi, repo_id: str, operations: list[Any], **__: Any) -> None:
        for one in operations:
            with one.as_file() as file:
                (pushed / one.path_in_repo).write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **__: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model = started(llama, factors, form)
    trained = change(model)
    model.push_to_hub("you/adapter")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} == {one.name for one in pushed.iterdir()}
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), pushed)), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_resumes_from_what_it_saved(llama: Path, factors: FactorSet, form: Form, tmp_path: Path) -> None:
    model = started(llama, factors, form)
    trained = change(model)
    model.save_pretrained(tmp_path / "trained")
    again = started(llama, factors, form)
    again.load_adapter(tmp_path / "trained", "default", is_trainable=True)
    assert torch.allclose(logits(again), trained, rtol=0, atol=1e-6)  # A up to the rounding of A − A0
    in_bfloat16 = started(llama, factors, form).bfloat16()
    in_bfloat16.load_adapter(tmp_path / "trained", "default")
    for name, parameter in in_bfloat16.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter.bfloat16(), again.get_parameter(name).bfloat16())
    other = started(llama, factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha), form)
    with pytest.raises(FactorFileError, match="trained from other factors"):
        other.load_adapter(tmp_path / "trained", "default")


@pytest.mark.parametrize("form", FORMS)
def test_programs_that_save_a_and_b_by_themselves(llama: Path, factors: FactorSet, form: Form, tmp_path: Path) -> None:
    """peft 1929: `get_peft_model_state_dict`, next to the config, is the plain LoRA too (OpenRLHF and veRL do so)."""
    model = started(llama, factors, form)
    trained = change(model)
    model.peft_config["default"].save_pretrained(tmp_path)
    save_file(get_peft_model_state_dict(model), tmp_path / "adapter_model.safetensors")
    judge = PeftModel.from_pretrained(load(llama), tmp_path)
    assert torch.allclose(logits(judge), trained, rtol=0, atol=1e-5)
    convert(tmp_path, factors, tmp_path / "lora", base=llama)
    again = started(llama, factors, form)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again), trained)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_state_dict_loads_into_the_same_start_alone(llama: Path, factors: FactorSet, form: Form) -> None:
    model = started(llama, factors, form)
    trained = change(model)
    again = started(llama, factors, form)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), trained)
    again = started(llama, factors, form)
    again.base_model.load_state_dict(model.base_model.state_dict())
    assert torch.equal(logits(again), trained)
    with pytest.raises(RuntimeError, match="_start"):
        started(llama, factors, "residual" if form == "delta" else "delta").load_state_dict(model.state_dict())
    other = started(llama, factorize(llama, ("q_proj", "v_proj"), rank=4, start=inilora_alpha), form)
    with pytest.raises(FactorFileError, match="other factors"):
        other.load_state_dict(model.state_dict())
    if form == "residual":
        with pytest.raises(FactorFileError, match="on the residual of other factors"):
            other.base_model.load_state_dict(model.base_model.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_lora_is_not_taken_for_a_trained_adapter(
    llama: Path, factors: FactorSet, form: Form, tmp_path: Path
) -> None:
    """A folder of A and B alone may be one that plain PEFT saved of an export, or a LoRA that started from nothing."""
    torch.manual_seed(0)
    plain = get_peft_model(load(llama), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).eval()
    plain.save_pretrained(tmp_path)
    model = started(llama, factors, form)
    trained = change(model)
    with pytest.raises(FactorFileError, match="has not started from the factors"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), trained)
    model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    assert torch.allclose(logits(model), logits(plain), rtol=0, atol=1e-5)


def test_training_is_not_overwritten(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """lerobot 3459: continuing with a trained adapter starts it again and says nothing."""
    model = started(llama, factors, "delta")
    initialize_peft(model, factors)
    trained = change(model)
    with pytest.raises(OptionError, match=r"is not new.*overwrite=True starts it again"):
        initialize_peft(model, factors)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True)
    with pytest.raises(OptionError, match=r"rank 8.*it is trained, and go on with it"):
        initialize_peft(again, factors)
    assert torch.equal(logits(initialize_peft(model, factors, overwrite=True)), logits(load(llama)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune"])
def test_adapters_are_combined_as_the_loras_that_they_save(
    llama: Path, factors: FactorSet, form: Form, kind: str, tmp_path: Path
) -> None:
    """peft 3761: add_weighted_adapter combines lora_A and lora_B, whatever they mean."""
    options = {"density": 0.7} if "ties" in kind or "prune" in kind else {}
    model = started(llama, factors, form)
    model.add_adapter("second", model.peft_config["default"])
    for name in ("default", "second"):
        model.set_adapter(name)
        change(model)
        if name == "second":
            change(model)
        model.save_pretrained(tmp_path, selected_adapters=[name])
    expected = logits(model)
    judge = PeftModel.from_pretrained(load(llama), tmp_path, adapter_name="default")
    judge.load_adapter(tmp_path / "second", "second")
    for one in (model, judge):
        one.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=kind, **options)
        one.set_adapter("both")
    assert torch.allclose(logits(model), logits(judge), rtol=0, atol=1e-5)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_not_made_again_on_loading(llama: Path, factors: FactorSet, form: Form, tmp_path: Path) -> None:
    """LLaMA-Factory's PiSSA callback sets "pissa" in the live config and saves: PEFT would take W apart again."""
    model = started(llama, factors, form)
    trained = change(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path)), trained, rtol=0, atol=1e-5)
    assert model.peft_config["default"].init_lora_weights == "pissa"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_would_change_the_base_is_refused(
    llama: Path, factors: FactorSet, form: Form, method: str, tmp_path: Path
) -> None:
    """transformers 34468, peft 2184: PiSSA changes the base weights under the adapters that are there."""
    get_peft_model(load(llama), LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=method)).save_pretrained(
        tmp_path
    )
    model = started(llama, factors, form)
    trained = change(model)
    for add in (
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: model.add_adapter("other", LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=method)),
    ):
        with pytest.raises(OptionError, match=r"changes base weights.*a model of its own"):
            add()
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), trained)
    model.add_adapter("other", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal"))
    assert torch.equal(logits(model), trained)


def test_dora_next_to_a_residual_is_refused(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """peft 2184's kind: DoRA's norm is the base weight's, so a DoRA trained on R was off by a tenth on W."""
    dora = LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    model = started(llama, factors, "residual")
    trained = change(model)
    with pytest.raises(OptionError, match=r'DoraLinearVariant computes with the base weight.*form="delta"'):
        model.add_adapter("dora", dora)
    assert torch.equal(logits(model), trained)
    model = started(llama, factors, "delta")
    model.add_adapter("dora", dora)
    model.set_adapter("dora")
    trained = change(model)
    model.save_pretrained(tmp_path, selected_adapters=["dora"])
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path / "dora")), trained, rtol=0, atol=1e-5)


def test_what_is_no_peft_model_is_refused(llama: Path, factors: FactorSet) -> None:
    """Mixed models, transformers' own add_adapter and injected adapters: save_pretrained would write A and B alone."""
    config = LoraConfig(r=4, target_modules=TARGETS)
    mixed = get_peft_model(load(llama), config, mixed=True)
    added, injected = load(llama), inject_adapter_in_model(config, load(llama))
    added.add_adapter(config)
    for model in (mixed, added, injected):
        with pytest.raises(OptionError, match="is no PeftModel"):
            initialize_peft(model, factors)


def test_a_second_peft_model_of_the_same_name_is_refused(llama: Path, factors: FactorSet) -> None:
    """peft 1689's kind: get_peft_model around a model that has adapters replaces those of the same name."""
    model = started(llama, factors, "delta")
    with pytest.raises(OptionError, match="'default': one of this name has started from factors already"):
        get_peft_model(model.get_base_model(), LoraConfig(r=4, target_modules=TARGETS))


@pytest.mark.parametrize("form", FORMS)
def test_saved_it_is_right_in_sixteen_bits(llama: Path, tmp_path: Path, form: Form) -> None:
    """vLLM and SGLang hold LoRAs in the model's dtype: nothing may cancel, also where BA is many times W."""
    model = started(llama, factorize(llama, tuple(TARGETS), rank=4, start=inilora_alpha), form)
    learned = change(model) - logits(load(llama))
    model.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(load(llama), tmp_path).eval()
    for name, parameter in served.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    # A half of bfloat16's last place in each of A and B, through two layers.
    assert float((logits(served) - logits(load(llama)) - learned).norm()) < 2**-6 * float(learned.norm())


@pytest.mark.parametrize("form", FORMS)
def test_saving_the_base_with_adapters_in_it_warns(llama: Path, factors: FactorSet, tmp_path: Path, form: Form) -> None:
    """transformers finds no weight of the adapted layers in it, and takes random ones; Axolotl's DPO ends with that."""
    model = started(llama, factors, form)
    trained = change(model)
    with pytest.warns(UserWarning, match=r"or save what merge_and_unload\(\) returns"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged")), trained, rtol=0, atol=1e-5)
