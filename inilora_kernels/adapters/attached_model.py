"""What an attached model's own `save_pretrained` writes: the plain model, as trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer import LoRALinear
from .weights import require_own_weight, require_unshared_weight, users_of_weights

_INSTEAD = "write what was learned by `save_adapter`"


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's adapters with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def save_as_trained(model: nn.Module) -> None:
    """Let every part of the model that has a `save_pretrained` (transformers', diffusers', the hub's) write W + ΔW.

    Trainers and other libraries call it, and the plain model's class loads the folder: with `base_layer.weight` in it,
    it would fill the layers with random numbers and go on.
    """
    for part in model.modules():
        if callable(getattr(part, "save_pretrained", None)) and "save_pretrained" not in vars(part):
            own: Any = part  # a method of one object, for which there is no type
            own.save_pretrained = partial(_save_pretrained, part)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_as_trained`."""
    for part in model.modules():
        saves = vars(part).get("save_pretrained")
        if isinstance(saves, partial) and saves.func is _save_pretrained:
            del part.save_pretrained


def _save_pretrained(model: Any, *args: Any, **options: Any) -> Any:
    """The model's own save_pretrained; state_dict, where given, is the gathered one of a sharded model.

    Raises WeightError or TargetError, before anything is written, where W + ΔW has no place: in a weight that is
    quantized, sharded, offloaded or shared.
    """
    users = users_of_weights(model)
    given = options.get("state_dict")
    for name, layer in adapters(model):
        if given is None:
            require_own_weight(layer.base_layer, f"save_pretrained: {name}", _INSTEAD)
        if isinstance(getattr(layer.base_layer, "weight", None), nn.Parameter):
            require_unshared_weight(users, name, layer.base_layer, "saving the trained weight", _INSTEAD)
    if given is not None:
        options["state_dict"] = _as_trained(model, given)
    return type(model).save_pretrained(model, *args, **options)


def _as_trained(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with W + ΔW under the plain layers' names, where it has the base layers' own."""
    state_dict = dict(given)
    for name, layer in adapters(model):
        inner = f"{name}.base_layer."
        for key in [key for key in state_dict if key.startswith(inner)]:
            state_dict[f"{name}.{key.removeprefix(inner)}"] = state_dict.pop(key)
        A, B = state_dict.get(f"{name}.lora_A.weight"), state_dict.get(f"{name}.lora_B.weight")
        if f"{inner}weight" in given and isinstance(A, Tensor) and isinstance(B, Tensor):
            state_dict[f"{name}.weight"] = layer.trained(state_dict[f"{name}.weight"], A, B)
    return state_dict
