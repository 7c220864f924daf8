"""One of PEFT's layers tried on itself: what the trial changes is put back; a forward pass of its own is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor

from inilora_kernels.adapters.peft_check import disabled, parts_of, put_back, require_layer_unchanged
from inilora_kernels.adapters.peft_layer import start_layer
from inilora_kernels.errors import TargetError
from inilora_kernels.factor_set import FactorSet

from .started import FORMS, TARGETS, load

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def layer(llama: Path) -> Any:
    model = get_peft_model(load(llama), LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5)).train()
    return model.get_submodule(f"base_model.model.{NAME}")


def looks(layer: Any) -> dict[str, Any]:
    """All that a layer holds and does, without running it."""
    return {
        "state": {name: tensor.clone() for name, tensor in layer.state_dict().items()},
        "attributes": sorted(vars(layer)),
        "classes": [type(module) for module in layer.modules()],
        "modes": [module.training for module in layer.modules()],
        "hooks": [len(module._forward_hooks) for module in layer.modules()],
        "parameters": [(id(parameter), parameter.requires_grad) for parameter in layer.parameters()],
        "variants": dict(layer.lora_variant),
    }


def require_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("form", FORMS)
def test_a_trial_leaves_no_trace(layer: Any, factors: FactorSet, form: Any) -> None:
    before = looks(layer)
    require_layer_unchanged(layer, NAME, factors[NAME].A, factors[NAME].B, form, "default")
    require_same(before, looks(layer))


@pytest.mark.parametrize("form", FORMS)
def test_a_start_can_be_undone(layer: Any, factors: FactorSet, form: Any) -> None:
    before, parts = looks(layer), parts_of(layer, "default")
    start_layer(layer, "default", factors[NAME].A, factors[NAME].B, form, NAME)
    assert [type(module) for module in layer.modules()] != before["classes"]
    put_back(layer, "default", parts)
    require_same(before, looks(layer))


@pytest.mark.parametrize("form", FORMS)
def test_a_forward_pass_that_reads_a_and_b_by_itself_is_refused(
    layer: Any, factors: FactorSet, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fused kernels do, to which neither A0 and B0 nor the base's change are known."""

    def fused(self: Any, x: Tensor) -> Tensor:
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        W = self.get_base_layer().weight if form == "delta" else 2 * self.get_base_layer().weight
        return x @ (W + self.scaling["default"] * B @ A).T

    monkeypatch.setattr(Linear, "forward", fused)
    before = looks(layer)
    with pytest.raises(TargetError, match=rf"^{NAME}: .*peft\.tuners\.lora\.layer\.Linear .*reads A and B by itself"):
        require_layer_unchanged(layer, NAME, factors[NAME].A, factors[NAME].B, form, "default")
    require_same(before, looks(layer))


def test_disabled_layers_are_on_again_after_an_error(layer: Any) -> None:
    with pytest.raises(ZeroDivisionError), disabled([layer]):
        1 / (0 if layer.disable_adapters else 1)
    assert not layer.disable_adapters
