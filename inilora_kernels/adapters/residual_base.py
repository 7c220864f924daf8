"""A base weight that is R, under PEFT's adapters: the output is W's wherever R without its adapter would be wrong.

In the residual form R + sBA means W + s(BA − B0A0), for exactly one adapter in effect with the scaling that it started
with. Disabled, deleted, scaled by another number, next to others, or swapped out by PEFT for a plain LoRA, it would
leave R. What is missing then is a multiple of s·B0A0, which the layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError
from .started import Started, unwrapped
from .weights import oriented, plus, warn_if_rounded_away

# A peft layer is an nn.Module as well as a LoraLayer, for which there is no one type.
Layer = Any


@torch.no_grad()
def subtract(layer: Layer, adapter_name: str, name: str) -> None:
    """Replace W by R = W − sBA, with A and B as they are in the layer, in whatever dtype it keeps them.

    name: the layer's, for a warning.
    """
    A, scaled_B = _update(layer, adapter_name)
    base_layer = layer.get_base_layer()
    weight: Tensor = base_layer.weight.data
    residual = plus(weight, -oriented(base_layer, scaled_B @ A))
    warn_if_rounded_away(weight, residual, name)
    base_layer.weight.data = residual
    take_for_residual(layer, adapter_name)


@torch.no_grad()
def take_for_residual(layer: Layer, adapter_name: str) -> None:
    """Let a layer whose base weight is R of this adapter's A and B stand in for W."""
    A, scaled_B = _update(layer, adapter_name)
    layer.register_buffer("subtracted_A", A.clone(), persistent=False)
    layer.register_buffer("subtracted_B", scaled_B.clone(), persistent=False)
    layer.subtracted_scaling = layer.scaling[adapter_name]
    layer.register_forward_hook(_restore_output, with_kwargs=True)
    layer._check_forward_args = partial(_check_forward_args, layer)
    layer.unload_and_optionally_merge_module = partial(_unload, layer)
    layer.supports_lora_conversion = _no_conversion


def _update(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A and sB of an adapter, in float32."""
    A, B = layer.lora_A[adapter_name].weight.detach().float(), layer.lora_B[adapter_name].weight.detach().float()
    return A, layer.scaling[adapter_name] * B


def is_residual(layer: Layer) -> bool:
    """Whether the layer's base weight is R."""
    return "subtracted_A" in layer._buffers


def require_still_started(layer: Layer, adapter_name: str) -> Started:
    """Return lora_A of an adapter that started from factors. Raises OptionError if it is one that knows no A0 now."""
    lora_A = unwrapped(layer.lora_A[adapter_name])
    if lora_A is None:
        raise OptionError(
            f"adapter {adapter_name!r}: something has replaced its lora_A since it was started from factors, as PEFT's "
            f"prepare_model_for_compiled_hotswap does; save it first, and do that with the plain LoRA which that writes"
        )
    return lora_A


def _share(layer: Layer, names: Iterable[str]) -> float:
    """How many times these adapters together put s·B0A0 back: 1 for the one that started, at its own scaling."""
    share = 0.0
    for name in names:
        started = layer.started_as.get(name) == "residual" and name in layer.lora_A
        if started and not require_still_started(layer, name).swapped():
            share += float(layer.scaling[name]) / layer.subtracted_scaling
    return share


def _restore_output(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Add s·B0A0x as many times as the adapters in effect do not."""
    names = kwargs.get("adapter_names")
    x: Tensor = args[0] if args else kwargs["x"]
    if names is not None:
        shares = {name: 1 - _share(layer, [name]) for name in dict.fromkeys(names)}
        if not any(shares.values()):
            return output
        missing = torch.tensor([shares[name] for name in names], dtype=x.dtype, device=x.device)
        x = x * missing.reshape(-1, *[1] * (x.dim() - 1))
        return (output + _subtracted(layer, x)).to(output.dtype)
    if layer.disable_adapters:
        share = 0.0
    else:
        share = _share(layer, layer.merged_adapters if layer.merged else layer.active_adapters)
    if share == 1:
        return output
    return (output + (1 - share) * _subtracted(layer, x)).to(output.dtype)


def _check_forward_args(layer: Layer, *args: Any, **kwargs: Any) -> None:
    """PEFT's own. torch.compile guards on attributes and not on hooks: by this one it tells the layer from others of
    its class that were compiled in the same process, without a hook.
    """
    type(layer)._check_forward_args(layer, *args, **kwargs)


def _subtracted(layer: Layer, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(layer.subtracted_A.dtype)
    return F.linear(F.linear(x, layer.subtracted_A), layer.subtracted_B)


@torch.no_grad()
def _unload(layer: Layer, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """The base layer with the adapters merged, or with W restored, to R's rounding."""
    if merge:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    base_layer: nn.Module = layer.get_base_layer()
    missing = 1 - _share(layer, layer.merged_adapters)
    if missing:
        product = oriented(base_layer, layer.subtracted_B @ layer.subtracted_A)
        base_layer.weight.data = plus(base_layer.weight.data, missing * product)  # type: ignore[arg-type]
    return base_layer


def _no_conversion(adapter_name: str = "default") -> bool:
    return False  # peft would convert BA, which belongs to R; save_pretrained writes what belongs to W
