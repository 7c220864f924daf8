"""Adapters on every module of a PyTorch model that has factors, without PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..choices import FORMS, Form
from ..errors import OptionError, TargetError
from ..factor_set import FactorSet, factor_set
from ..model.experts import parameter_of_expert
from ..suggestions import require_choice
from ..torch_defaults import trainable_tensors
from .attached_model import adapters, save_as_before, save_as_trained
from .base import require_original
from .layer import LoRALinear
from .live_model import model_config, output_of, random_inputs, require_called, require_same_output
from .modules import Start, find_starts, is_conv1d, linear_shape
from .started import gathered
from .weights import (
    has_weight_of,
    require_gradients,
    require_own_weight,
    require_unshared_weight,
    users_of_weights,
    warn_if_rounded_away,
    warn_of_dropout,
    with_shared,
)
from .wrappers import plain_name, unwrapped_model

Model = TypeVar("Model", bound=nn.Module)

_FROZEN = "_inilora_trained_before"


@trainable_tensors()
def attach(
    model: Model,
    factors: FactorSet | str | Path,
    form: Form = "delta",
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Model:
    """Put an adapter on every module of the model that has factors, in place, and freeze all the rest.

    The model's output stays what it was: to the bit in the delta form, to the rounding of R = W − sBA in the
    residual form. To train a head too, unfreeze it after this call. Nothing is changed if this raises.

    The model's own `save_pretrained` and `state_dict` have W + s(BA − B0A0) under the plain model's names, and A and B:
    the plain model's class loads them as trained, and a model with the same factors attached resumes from them.

    model: any nn.Module whose linear layers are the checkpoint's, also a quantized one (delta form).
    factors: from `approximate_model` or `FactorSet.load`, float32, BA ≈ W; or the path of a factor file.
    form: "delta" or "residual".
    scaling: s; A and B are divided by √s, so sBA stays the same.
    dropout: probability for the adapter's input.

    Returns the model. Raises TargetError (no such module, a shape differs, an adapter is there already, also one of
    PEFT's, the code around a module reads its weight instead of calling it, a quantized module passes no gradients, or
    a residual form of a weight that two modules share), FactorFileError (factors of another model, judging by the
    weights' values), OptionError (form, scaling, dropout, a model loaded from a residual folder) and WeightError
    (residual form of a quantized, sharded or offloaded weight). Warns where the residual form would lose W to rounding.

    >>> from inilora_kernels.factors import Certificate, Factors
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> certificate = Certificate(loss=0.0, optimum=0.0, energy=1.0, steps=0)
    >>> start = Factors(torch.randn(1, 4), torch.randn(3, 1), certificate, source_sha256="")
    >>> x = torch.randn(2, 4)
    >>> expected = model(x)
    >>> attached = attach(model, FactorSet({"0": start}, {}))
    >>> torch.equal(attached(x), expected), sum(p.numel() for p in trainable_parameters(model))
    (True, 7)
    """
    require_choice("form", form, FORMS)
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"dropout={dropout}: it must be at least 0 and below 1")
    require_original(model)
    where = type(model).__name__
    if any(True for _ in adapters(model)):
        raise TargetError(f"{where} has adapters already; call detach(model) first")
    modules = dict(model.named_modules())
    _require_no_peft(modules, where)
    shapes = {name: shape for name, module in modules.items() if name and (shape := linear_shape(module))}
    _require_no_experts(factors := factor_set(factors))
    fits = partial(has_weight_of, model, factors)
    starts = find_starts(shapes, factors, where, model_config(model), fits=fits, model=model)
    starts = with_shared(starts, model, shapes)
    scaled = {name: start.scaled(scaling) for name, start in starts.items()}
    require_called(model, starts)
    for name in starts:
        require_gradients(modules[name], name)
    if form == "residual":
        warn_of_dropout(dropout)
        users = users_of_weights(model)
        for name, start in starts.items():
            _require_residual(name, modules[name], start, users)
    inputs = random_inputs(model)
    before = None if inputs is None else output_of(model, inputs)
    if before is not None and form == "residual" and before.dtype.itemsize < 4:
        before = None  # R's rounding may be all there is
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    for name, (A, B) in scaled.items():
        _replace(model, name, LoRALinear(modules[name], A, B, form, scaling, dropout))
    setattr(model, _FROZEN, trained)
    if inputs is not None and before is not None:
        try:
            require_same_output(before, output_of(model, inputs), where)
        except TargetError:
            detach(model)
            raise
    save_as_trained(model)
    return model


def detach(model: Model) -> Model:
    """Take the adapters off, in place, and return the model as it was before `attach`, its weights bit for bit."""
    for name, layer in list(adapters(model)):
        _replace(model, name, layer.restored_base_layer())
    trained: frozenset[str] = getattr(model, _FROZEN, frozenset())
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    save_as_before(model)
    if hasattr(model, _FROZEN):
        delattr(model, _FROZEN)
    return model


def merge(model: Model) -> Model:
    """Put every adapter into its base layer's weight: W + s(BA − B0A0). `unmerge` undoes it bit for bit.

    Raises, before any change, WeightError where a base layer is quantized, sharded or offloaded, and TargetError where
    another module shares its weight and would change with it.
    """
    layers = list(adapters(model))
    users = users_of_weights(model)
    for name, layer in layers:
        instead = "`inilora convert` makes an adapter to load next to it"
        require_own_weight(layer.base_layer, name, instead)
        require_unshared_weight(users, name, layer.base_layer, "merging", instead)
    for _, layer in layers:
        layer.merge()
    return model


def unmerge(model: Model) -> Model:
    """Undo `merge`, bit for bit."""
    for _, layer in adapters(model):
        layer.unmerge()
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, for an optimizer."""
    return [parameter for _, parameter in _named(model)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B alone: `{module}.lora_A.weight` (r, in_features) and `{module}.lora_B.weight` (out_features, r).

    Names are those of the plain model, even through DDP and torch.compile. Under FSDP2 the tensors are
    gathered, so every process has to call this.
    """
    return {name: gathered(parameter.detach()) for name, parameter in _named(model)}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load what `adapter_state_dict` returned into a model to which the same factors are attached.

    Raises TargetError, before any change, if names or shapes differ.
    """
    parameters = dict(_named(model))
    if parameters.keys() != state_dict.keys():
        odd = sorted(parameters.keys() ^ state_dict.keys())[0]
        side = "the model" if odd in parameters else "the state dict"
        raise TargetError(f"{odd} is only in {side}; attach the factors that the state dict was trained from")
    for name, parameter in parameters.items():
        if parameter.shape != state_dict[name].shape:
            raise TargetError(
                f"{name} is {tuple(parameter.shape)} in the model and {tuple(state_dict[name].shape)} "
                f"in the state dict; attach the factors that it was trained from"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(state_dict[name], parameter))


def _require_no_peft(modules: Mapping[str, nn.Module], where: str) -> None:
    """Raise TargetError for a PeftModel and for a base that has PEFT's layers: PEFT saves and merges its own alone."""
    for name, module in modules.items():
        if any(owner.__module__.startswith("peft.") for owner in type(module).__mro__):
            raise TargetError(
                f"{f'{where}: {name}' if name else where} is PEFT's, which would not save what these adapters learn; "
                f"start PEFT's own adapter by initialize_peft, or attach to what its unload or merge_and_unload returns"
            )


def _require_no_experts(factors: FactorSet) -> None:
    experts = next((name for name in factors if parameter_of_expert(name)), None)
    if experts is not None:
        raise TargetError(
            f"{experts}: adapters of experts need PEFT's target_parameters; use lora_model or initialize_peft, or make "
            f"the factors again without target_parameters"
        )


def _require_residual(name: str, base_layer: nn.Module, start: Start, users: Mapping[int, list[str]]) -> None:
    instead = 'use form="delta", which leaves the base as it is'
    require_own_weight(base_layer, name, instead)
    require_unshared_weight(users, name, base_layer, "the residual form", instead)
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    product = (start.B @ start.A).to(weight.device)
    oriented = product.T if is_conv1d(base_layer) else product
    warn_if_rounded_away(weight.detach(), weight.detach().float() - oriented, name)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in adapters(unwrapped_model(model)):
        plain = plain_name(name).removeprefix("module.")  # other libraries' wrappers call it so, too
        for linear in ("lora_A", "lora_B"):
            yield f"{plain}.{linear}.weight", layer.get_parameter(f"{linear}.weight")


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
