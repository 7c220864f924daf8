"""Modules trained whole next to a LoRA (`modules_to_save`): their tensors in the checkpoint, shared or not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import FactorFileError, TargetError
from ..model.architecture import Architecture, architectures
from ..model.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class TrainedWhole:
    """What a merged model has in other places than a LoRA's.

    values: the new values of tensors of the checkpoint, by name.
    untied: tensors to add, since the model shared them and was trained with different ones: their values, or the name
        of the checkpoint's tensor with which they were shared and which gives them theirs.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, Tensor | str] = field(default_factory=dict)


def find_trained_whole(checkpoint: Checkpoint, live: Mapping[str, str], others: Mapping[str, Tensor]) -> TrainedWhole:
    """Return where in the checkpoint the tensors of modules trained whole belong.

    live: the checkpoint's tensor of each weight with an adapter, by its name in the trained model.
    others: the tensors trained whole, by their names in the trained model.

    A weight that the model shares between an embedding and its output layer, and of which one was trained, becomes two
    (peft 2777: merged, the output layer changed too). Raises FactorFileError if the checkpoint has no tensor of that
    name and shape, TargetError if another shared weight would change for modules that were not trained.
    """
    architecture = _trained_architecture(checkpoint, live, others)
    stored = _stored_names(checkpoint, live, architecture)
    sharing = _sharing(architecture)
    found = TrainedWhole()
    for name, value in others.items():
        tensor = stored.get(name)
        if tensor is None and name in sharing:
            _add_shared(found, name, value, sharing[name], {**others, **live})
            continue
        entry = checkpoint.tensors.get(tensor or name)
        if entry is None or entry.shape != tuple(value.shape):
            raise FactorFileError(
                f"{checkpoint.path}: no tensor {tensor or name} of shape {tuple(value.shape)}, which training has "
                f"made; use `inilora convert`, then PEFT's merge_and_unload, which knows the model's class"
            )
        found.values[tensor or name] = value
    trained = others.keys() | live.keys()
    changed = found.values.keys() | set(live.values())
    for shared, tensor in sharing.items():
        if tensor in changed and shared not in trained:
            _untie(found, checkpoint, architecture, shared, tensor)
    return found


def _add_shared(
    found: TrainedWhole, name: str, value: Tensor, tensor: str, trained: Mapping[str, Tensor | str]
) -> None:
    """A trained weight without a tensor of its own: the same as that of its partner, or from now on another."""
    partner = next((other for live, other in trained.items() if live != name and isinstance(other, Tensor)), None)
    if partner is None or partner.shape != value.shape or not torch.equal(partner, value):
        found.untied[name] = value


def _untie(
    found: TrainedWhole, checkpoint: Checkpoint, architecture: Architecture | None, shared: str, tensor: str
) -> None:
    outputs = architecture.output_names if architecture else ()
    if shared.removesuffix(".weight") not in outputs or shared in checkpoint.tensors:
        raise TargetError(
            f"{checkpoint.path}: {tensor} was trained, and the model shares it with {shared}, which was not: merged, "
            f"both would change; use `inilora convert` and load the adapter next to the model"
        )
    found.untied.setdefault(shared, tensor)


def _trained_architecture(
    checkpoint: Checkpoint, live: Mapping[str, str], others: Collection[str]
) -> Architecture | None:
    """The class whose names the adapter has; None if there is none such."""
    modules = [name.removesuffix(".weight") for name in checkpoint.weights if name.endswith(".weight")]
    for architecture in architectures(checkpoint.config, modules) if checkpoint.config else ():
        names = architecture.parameter_names
        if all(name in names for name in live) and all(name in names for name in others):
            return architecture
    return None


def _stored_names(checkpoint: Checkpoint, live: Mapping[str, str], architecture: Architecture | None) -> dict[str, str]:
    """The checkpoint's tensor by the parameter's name in the model."""
    if architecture is not None:
        names = {architecture.live_name(tensor): tensor for tensor in checkpoint.tensors}
        return {name: tensor for name, tensor in names.items() if name is not None}
    # Without a class to ask, one prefix for all, which one known pair tells.
    name, tensor = next(iter(live.items()))
    added, taken = name.removesuffix(tensor), tensor.removesuffix(name)
    if name.endswith(tensor):
        return {f"{added}{other}": other for other in checkpoint.tensors}
    return {other.removeprefix(taken): other for other in checkpoint.tensors}


def _sharing(architecture: Architecture | None) -> dict[str, str]:
    """The checkpoint's tensor that gives each weight without one of its own its values, by the weight's live name."""
    if architecture is None:
        return {}
    own = {layer.name for layer in architecture.layers.values()}
    return {
        f"{other}.weight": f"{module}.weight"
        for module, layer in architecture.layers.items()
        for other in layer.shared_with
        if other not in own
    }
