"""What a base layer's weight is, and whether it may be changed: plain, quantized, sharded, offloaded, shared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TargetError, WeightError
from .modules import is_conv1d, linear_shape


def require_own_weight(base_layer: nn.Module, what: str, instead: str) -> None:
    """Raise WeightError unless the weight is a whole, plain floating-point matrix in memory, which can be changed.

    what: the layer's name in the message; instead: what to do.
    """
    weight = getattr(base_layer, "weight", None)
    data = weight.data if isinstance(weight, Tensor) else None
    if data is not None and type(data) is Tensor and data.is_floating_point() and data.dtype.itemsize >= 2:
        shape = linear_shape(base_layer)
        stored = shape if shape is None or not is_conv1d(base_layer) else shape[::-1]
        if not data.is_meta and tuple(data.shape) == stored:
            return
        found = "on the meta device" if data.is_meta else f"a shard of shape {tuple(data.shape)}"
        raise WeightError(f"{what}: the base weight is offloaded or sharded ({found}); {instead}")
    found = "no `weight`" if data is None else f"{type(data).__name__} of {data.dtype}"
    raise WeightError(f"{what}: the base weight is quantized or sharded ({found}); {instead}")


def users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that have each parameter `weight`, by its id; more than one where it is shared."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return users


def require_unshared_weight(
    users: Mapping[int, Sequence[str]], name: str, base_layer: nn.Module, what: str, instead: str
) -> None:
    """Raise TargetError if another module of the model shares the weight, so that `what` would change it too.

    users: what `users_of_weights` says of the model; name: the layer's, under which its base layer is found too.
    """
    for user in users.get(id(base_layer.weight), ()):
        if user != name and not user.startswith(f"{name}."):
            raise TargetError(f"{name}: its weight is also {user}.weight, which {what} would change too; {instead}")


def device_of(base_layer: nn.Module) -> torch.device:
    """Where an adapter belongs: the device of the layer's tensors, or the one that accelerate moves them to."""
    device: torch.device | int | str | None = next(
        (tensor.device for tensor in [*base_layer.parameters(), *base_layer.buffers()]), None
    )
    if device is None or torch.device(device).type == "meta":
        device = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    device = torch.device("cpu" if device is None else device)
    return torch.device("cpu") if device.type == "meta" else device


def oriented(base_layer: nn.Module, product: Tensor) -> Tensor:
    """A product (out_features, in_features) as the base layer stores its weight."""
    return product.T if is_conv1d(base_layer) else product


def plus(weight: Tensor, update: Tensor) -> Tensor:
    """Their sum, taken in float32, in the weight's dtype."""
    return (weight.float() + update.to(weight.device)).to(weight.dtype).contiguous()


def warn_if_rounded_away(weight: Tensor, residual: Tensor, name: str) -> None:
    """Warn if R is so much larger than W that its rounding error is 4 times that of W in its own dtype.

    This happens with IniLoRA-α's factors, whose product is about 35 times W.
    """
    growth = float(residual.float().norm() / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
    if growth > 4 and weight.dtype.itemsize < 4:
        loss = growth * torch.finfo(weight.dtype).eps / math.sqrt(12)
        warnings.warn(
            f"{name}: the residual is {growth:.0f} times as large as the weight, so {weight.dtype} "
            f'rounds away about {loss:.1%} of the weight; use form="delta", which leaves the base as it is',
            stacklevel=3,
        )
