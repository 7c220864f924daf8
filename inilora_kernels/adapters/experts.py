"""Experts in PEFT: parameters that `target_parameters` adapts, started from the factors of each expert.

PEFT's ParamWrapper keeps the adapters of all E experts of a parameter in two matrices,

    A_e = rows e·r to (e + 1)·r of lora_A (E·r, k)        B_e = columns e, E + e, 2E + e, … of lora_B (d, r·E)

and for each forward pass puts W_e + s·B_e A_e in the parameter's place. Here both are stacks: A (E, r, k), B (E, d, r).
In the delta form what is added is s[B_e, B_e − B_e0][A_e − A_e0; A_e0], which is 0 to the bit at the start.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..errors import OptionError, TargetError, WeightError
from ..model.experts import may_hold_experts
from .peft_layer import StartedLoraConfig
from .residual_base import Layer
from .started import DeltaA, DeltaB, difference


class ExpertsA(DeltaA):
    """lora_A of all experts, (E·r, in_features); PEFT reads its weight and never calls it."""


class ExpertsB(DeltaB):
    """lora_B of all experts, (out_features, r·E); PEFT reads its weight and never calls it."""


def laid_out(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Stacks A (E, r, k) and B (E, d, r) as PEFT has them: lora_A (E·r, k), lora_B (d, r·E).

    >>> A, B = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    >>> [x.shape for x in laid_out(A, B)]
    [torch.Size([6, 5]), torch.Size([4, 6])]
    >>> all(torch.equal(x, y) for x, y in zip(stacks(*laid_out(A, B), 3), (A, B)))
    True
    """
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacks(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A (E·r, k) and lora_B (d, r·E) as stacks A (E, r, k) and B (E, d, r)."""
    A, B = lora_A.reshape(experts, -1, lora_A.shape[1]), lora_B.reshape(lora_B.shape[0], -1, experts)
    return A, B.permute(2, 0, 1)


def expert_shapes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(E, d, k) of every parameter of a model that may hold experts, adapted or not, by its name in the plain model."""
    shapes = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if may_hold_experts(module, parameter):
                count, *sides = parameter.shape
                d, k = reversed(sides) if getattr(module, "is_transposed", False) else sides
                shapes[f"{_plain(path)}.{name}"] = (count, d, k)
    return shapes


def name_of(layer: Layer, path: str) -> str:
    """The factors' name for one of PEFT's layers: its path, or that of the parameter that it adapts."""
    return f"{_plain(path)}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "base_layer")


def require_expert_parameter(layer: Layer, name: str) -> None:
    """Raise unless the parameter holds a whole matrix of numbers for each expert, in memory."""
    parameter = layer.get_param()
    if parameter.dim() != 3:
        raise TargetError(
            f"{name}: a parameter of shape {tuple(parameter.shape)}; factors start linear layers, named in "
            f"target_modules, and parameters of experts (experts, …, …)"
        )
    if type(parameter.data) is not Tensor or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise WeightError(
            f"{name}: the experts are quantized or sharded ({type(parameter.data).__name__} of {parameter.dtype}), "
            f"and PEFT adds to them in their own dtype; load the model dequantized, and shard it after the start"
        )


@torch.no_grad()
def start_experts(layer: Layer, adapter_name: str, A: Tensor, B: Tensor, name: str) -> None:
    """Start one adapter of a ParamWrapper from stacks A (E, r, k) and B (E, d, r), in the delta form.

    name: of the parameter, in messages. Raises TargetError if the parameter with the adapter does not equal the bare
    one bit for bit.
    """
    _install(layer, adapter_name, *laid_out(A, B))
    before = layer.get_param()
    if before.is_meta:
        return
    with layer._activate_lora([adapter_name]):
        same = torch.equal(layer.get_param(), before)
    if not same:
        raise TargetError(
            f"{name}: with the factors the experts are not what they were; this version of PEFT computes their update "
            f"in a way of its own: leave the experts out of target_parameters"
        )


def _install(layer: Layer, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> None:
    for modules, of, values in ((layer.lora_A, ExpertsA, lora_A), (layer.lora_B, ExpertsB, lora_B)):
        linear = modules[adapter_name]
        weight = linear.weight
        if weight.is_meta:
            weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=layer.get_param().device))
        weight.data.copy_(values)
        started = of(weight, weight.detach(), persistent=True).train(linear.training)
        started.blocks = layer.num_experts if of is ExpertsA else 1
        modules[adapter_name] = started
    layer.get_delta_factors = partial(_delta_factors, layer)
    layer.get_delta_weight = partial(_delta_weight, layer)
    layer.update_layer = partial(_update_layer, layer)


def _is_started(layer: Layer, adapter_name: str) -> bool:
    lora_A = layer.lora_A[adapter_name]
    return isinstance(lora_A, ExpertsA) and not lora_A.swapped()


def _sides(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """The two stacks whose product is BA − B0A0 as the parameter has it."""
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    trained = stacks(lora_A.weight, lora_B.weight, layer.num_experts)
    A, B = difference(*trained, *stacks(lora_A.initial, lora_B.initial, layer.num_experts))
    if layer._did_swap_in_out_features:
        return B, A
    return A.transpose(1, 2), B.transpose(1, 2)


def _delta_factors(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor, float]:
    if not _is_started(layer, adapter_name):
        plain: tuple[Tensor, Tensor, float] = type(layer).get_delta_factors(layer, adapter_name)
        return plain
    dtype = layer.get_param().dtype
    left, right = _sides(layer, adapter_name)
    return left.to(dtype), right.to(dtype), layer.scaling[adapter_name]


def _delta_weight(layer: Layer, adapter_name: str, *others: Any, **options: Any) -> Tensor:
    if not _is_started(layer, adapter_name):
        plain: Tensor = type(layer).get_delta_weight(layer, adapter_name, *others, **options)
        return plain
    left, right = _sides(layer, adapter_name)
    product: Tensor = layer.scaling[adapter_name] * (left @ right)
    return product.to(layer.get_param())


def _update_layer(layer: Layer, adapter_name: str, *others: Any, config: Any, **options: Any) -> None:
    """Add an adapter. One that comes with a started one's config, as TRL's reference does, starts from the same."""
    plain = copy.copy(config)
    source = config.started_from if isinstance(config, StartedLoraConfig) else None
    if source is not None:
        plain.started_from = None
    type(layer).update_layer(layer, adapter_name, *others, config=plain, **options)
    if source is None:
        return
    if source not in layer.lora_A or not _is_started(layer, source):
        raise OptionError(
            f"adapter {adapter_name!r}: its config starts it from the factors of adapter {source!r}, which is gone; "
            f"make a new LoraConfig and call initialize_peft"
        )
    with torch.no_grad():
        _install(layer, adapter_name, layer.lora_A[source].initial, layer.lora_B[source].initial)
