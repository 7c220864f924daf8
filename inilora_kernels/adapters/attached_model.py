"""What an attached model's own `save_pretrained` writes: the plain model, as trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer import LoRALinear
from .weights import require_own_weight, require_unshared_weight, users_of_weights

_INSTEAD = "write what was learned by `save_adapter`"

# What torch.compile, activation checkpointing and FSDP1 put into module names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Where the classes are that hold a model as their one child, `module` or one of the above.
_HOLDERS = ("torch.nn.parallel.", "torch.optim.swa_utils", "torch._dynamo.", "torch.distributed.", "deepspeed.")


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The model's adapters with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model that DDP, torch.compile, AveragedModel, FSDP1 and DeepSpeed's engine hold, one in the other."""
    held = next((child for name, child in model.named_children() if name == "module" or name in _WRAPPERS), None)
    holds = any(owner.__module__.startswith(_HOLDERS) for owner in type(model).__mro__)
    return unwrapped_model(held) if holds and held is not None else model


def plain_name(name: str) -> str:
    """A name in an unwrapped model without what wrappers of its parts have put in.

    >>> plain_name("layers.0._orig_mod.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
