"""R in W's place: the output is W's wherever R with this one adapter is not what is meant."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from inilora_kernels.adapters.attach import attach
from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.export import export_residual
from inilora_kernels.adapters.peft import initialize_peft, load_residual
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError
from inilora_kernels.factor_set import FactorSet

from .started import FORMS, TARGETS, change, load, logits, started


def near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-5)


def plain(llama: Path, folder: Path, **options: object) -> PeftModel:
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options})
    model = get_peft_model(load(llama), config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 2, "lora_alpha": 16},
        {"r": 8},
        {"r": 4, "use_rslora": True},
        {"r": 4, "target_modules": ["v_proj"]},
        {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj"]},
    ],
)
def test_hotswap_of_a_plain_lora(
    llama: Path, factors: FactorSet, form: Form, options: dict[str, object], tmp_path: Path
) -> None:
    """PEFT's hotswap replaces A and B, of any rank, of some of the modules, and knows nothing of A0, B0 and R."""
    swapped_in = plain(llama, tmp_path, **options)
    model = started(llama, factors, form, use_rslora=bool(options.get("use_rslora")))
    change(model)
    hotswap_adapter(model, str(tmp_path), "default")
    assert near(logits(model), logits(swapped_in))
    with model.disable_adapter():
        assert near(logits(model), logits(load(llama)))
    model.state_dict()
    assert near(logits(model), logits(swapped_in))
    with pytest.raises(OptionError, match="copy the folder that was swapped in"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(OptionError, match="adapter 'default', which is gone"):
        model.add_adapter("ref", model.peft_config["default"])
    assert near(logits(model.merge_and_unload()), logits(swapped_in))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [None, 4, 8])
def test_hotswap_prepared_for_compiled_models(
    llama: Path, factors: FactorSet, form: Form, rank: int | None, tmp_path: Path
) -> None:
    """Padding replaces lora_A by a layer that knows no A0: then the next forward pass says so."""
    swapped_in = plain(llama, tmp_path)
    model = started(llama, factors, form)
    change(model)
    prepare_model_for_compiled_hotswap(model, target_rank=rank)
    if rank == 8:
        with pytest.raises(OptionError, match="something has replaced its lora_A"):
            logits(model)
        return
    hotswap_adapter(model, str(tmp_path), "default")
    assert near(logits(model), logits(swapped_in))


@pytest.mark.parametrize("form", FORMS)
def test_scaled_it_is_the_same_part_of_what_was_learned(
    llama: Path, factors: FactorSet, form: Form, tmp_path: Path
) -> None:
    """PEFT's rescale_adapter_scale, set_scale and scale_layer multiply BA, which R would not survive."""
    model = started(llama, factors, form)
    change(model)
    model.save_pretrained(tmp_path)
    judge = PeftModel.from_pretrained(load(llama), tmp_path).eval()
    for scale in (0.0, 0.5, 2.0):
        with rescale_adapter_scale(model, scale), rescale_adapter_scale(judge, scale):
            assert near(logits(model), logits(judge)), scale
            assert near(logits(copy.deepcopy(model).merge_and_unload()), logits(judge)), scale
    assert near(logits(model), logits(judge))


def test_compiled_after_another_model_of_the_same_class(llama: Path, factors: FactorSet) -> None:
    """torch.compile guards on no hooks: the second model would run the graph of the first, which has none."""
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        for form in FORMS:
            model = started(llama, factors, form)
            trained = change(model)
            compiled = torch.compile(model, backend="eager")
            assert near(compiled(ids).logits, trained)
            with model.disable_adapter():
                assert near(compiled(ids).logits, logits(load(llama)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_it_stands_alone(
    llama: Path, factors: FactorSet, form: Form, twin: Callable[[nn.Module], PeftModel], tmp_path: Path
) -> None:
    model = started(llama, factors, form)
    before = logits(model)
    copied = twin(model)
    trained = change(copied)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)
    assert near(logits(PeftModel.from_pretrained(load(llama), tmp_path)), trained)
    with copied.disable_adapter():
        assert near(logits(copied), logits(load(llama)))


def test_a_residual_folder_is_the_original_where_its_adapter_is_off(
    llama: Path, factors: FactorSet, tmp_path: Path
) -> None:
    """trl 3196's kind: DPO with a residual folder took R, the model without its adapter, for the reference."""
    export_residual(llama, factors, tmp_path / "out", lora_alpha=8)
    model = load_residual(load(tmp_path / "out/base"), tmp_path / "out").eval()
    original = logits(load(llama))
    assert near(logits(model), original)
    trained = change(model)
    with model.disable_adapter():
        assert near(logits(model), original)
    assert near(logits(model), trained)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert near(logits(model), original)
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "lora", selected_adapters=["default"])
    saved = model.peft_config["default"]
    assert saved.base_model_name_or_path == str(llama.resolve())
    assert near(logits(PeftModel.from_pretrained(load(llama), tmp_path / "lora")), trained)
    convert(tmp_path / "lora", factors, tmp_path / "converted")
    assert near(logits(PeftModel.from_pretrained(load(llama), tmp_path / "converted")), trained)
    resumed = load_residual(load(tmp_path / "out/base"), tmp_path / "out").eval()
    resumed.load_adapter(tmp_path / "lora", "default")
    assert near(logits(resumed), trained)
    assert near(logits(model.merge_and_unload()), trained)


def test_what_is_not_the_residual_is_refused(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """R loaded for W, W loaded for R, and an adapter trained in its place by PEFT alone: each would be off by BA."""
    export_residual(llama, factors, tmp_path / "out")
    with pytest.raises(OptionError, match="this model is not the residual"):
        load_residual(load(llama), tmp_path / "out")
    with pytest.raises(OptionError, match=r"holds R = W − sBA.*load_residual"):
        attach(load(tmp_path / "out/base"), factors)
    model = get_peft_model(load(tmp_path / "out/base"), LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(OptionError, match=r"holds R = W − sBA.*load_residual"):
        initialize_peft(model, factors)
    by_peft = PeftModel.from_pretrained(load(tmp_path / "out/base"), tmp_path / "out/adapter", is_trainable=True)
    change(by_peft)
    by_peft.save_pretrained(tmp_path / "out/adapter")
    with pytest.raises(OptionError, match="not the adapter that was exported with this base"):
        load_residual(load(tmp_path / "out/base"), tmp_path / "out")
