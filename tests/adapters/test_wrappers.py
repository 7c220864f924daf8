"""Started models that torch.compile or DDP has wrapped, whole or in part: they save under the model's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from inilora_kernels import lora_model
from inilora_kernels.adapters.convert import convert
from inilora_kernels.adapters.wrappers import own_names, without_wrappers
from inilora_kernels.choices import Form
from inilora_kernels.errors import OptionError
from inilora_kernels.factor_set import FactorSet

from .started import FORMS, change, load, logits


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """Names are what is tested; tracing takes most of a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def with_compiled_layers(model: Any) -> Any:
    layers = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers
    for number, layer in enumerate(layers):
        layers[number] = compiled(layer)
    return model


WAYS: dict[str, Callable[[Path, FactorSet, Form], Any]] = {
    "base": lambda llama, factors, form: lora_model(compiled(load(llama)), factors, form),
    "layers": lambda llama, factors, form: with_compiled_layers(lora_model(load(llama), factors, form)),
    "both": lambda llama, factors, form: with_compiled_layers(lora_model(compiled(load(llama)), factors, form)),
    "parallel": lambda llama, factors, form: lora_model(nn.DataParallel(load(llama)), factors, form),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_what_it_saves_is_for_the_original_and_resumes(
    llama: Path, factors: FactorSet, form: Form, way: str, tmp_path: Path
) -> None:
    """A and B alone were written under a config of twice their rank, and merged into W as if they were the update."""
    model = WAYS[way](llama, factors, form)
    trained = change(model.eval())
    wrapped = [type(module) for module in model.modules()]
    model.save_pretrained(tmp_path / "trained")
    assert [type(module) for module in model.modules()] == wrapped
    plain = PeftModel.from_pretrained(load(llama), tmp_path / "trained")
    assert torch.allclose(logits(plain), trained, rtol=0, atol=1e-5)
    convert(tmp_path / "trained", factors, tmp_path / "lora", base=llama)
    again = WAYS[way](llama, factors, form)
    again.load_adapter(tmp_path / "trained", "default", is_trainable=True)
    assert torch.allclose(logits(again.eval()), trained, rtol=0, atol=1e-6)
    again = WAYS[way](llama, factors, form)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval()), trained)
    ranks = {min(one.shape) for key, one in get_peft_model_state_dict(model).items() if key.endswith("weight")}
    assert ranks == {8}


def test_factors_of_some_modules_of_a_compiled_base(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    """Their target_modules are whole names."""
    some = FactorSet({name: one for name, one in factors.items() if "layers.0." in name}, {})
    model = lora_model(compiled(load(llama)), some)
    trained = change(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(llama), tmp_path)), trained, rtol=0, atol=1e-5)


def test_a_state_dict_without_a_started_weight_is_not_saved(llama: Path, factors: FactorSet, tmp_path: Path) -> None:
    model = lora_model(load(llama), factors)
    given = {key: value for key, value in model.state_dict().items() if "layers.0." in key}
    with pytest.raises(OptionError, match=r"is not in the state dict to save"):
        model.save_pretrained(tmp_path / "out", state_dict=given)
    assert not (tmp_path / "out").exists()


def test_names_within_wrappers() -> None:
    inner = nn.Sequential(compiled(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    model = nn.Sequential(nn.DataParallel(compiled(inner)))
    plain = ["0.0.0.weight", "0.0.0.bias", "0.1.weight", "0.1.bias"]
    assert list(own_names(model, model.state_dict())) == plain
    with without_wrappers(model) as wrapped:
        assert wrapped
        assert list(model.state_dict()) == plain
    assert list(own_names(model, model.state_dict())) == plain
    assert list(model.state_dict()) != plain
