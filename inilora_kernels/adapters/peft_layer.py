"""One of PEFT's LoRA layers, started from factors: what its parts become, and the form that it is in.

PEFT's layers are taken as they are. `lora_A` and `lora_B` become modules that know A0 and B0, which is all that the
forward pass needs in the delta form. What is left goes through PEFT's own seams: a LoraVariant for merging, and the
config, which says that an adapter added with it starts from the same factors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from ..choices import Form
from ..errors import OptionError
from .modules import is_conv1d
from .started import DeltaA, DeltaB, Started, StartedA, StartedB, difference
from .weights import device_of, warn_if_rounded_away

# A peft layer is an nn.Module as well as a LoraLayer, for which there is no one type.
Layer = Any


@dataclass
class StartedLoraConfig(LoraConfig):
    """The LoraConfig of an adapter that started from factors.

    An adapter added with it, as TRL's trainers add "ref", starts from the same factors; a model that knows nothing of
    them refuses it, as PEFT does any variant that its layers lack. On disk it is the config of the plain LoRA of rank
    2r that `save_pretrained` writes.

    started_from: the adapter that has the factors. form: its form.
    """

    started_from: str | None = field(default=None, init=False, metadata={"is_lora_variant": True})
    form: Form | None = field(default=None, init=False)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {name: value for name, value in values.items() if name not in ("started_from", "form")}

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write adapter_config.json for twice the rank and the same scaling."""
        if self.started_from is None:
            LoraConfig.save_pretrained(self, save_directory, **options)
            return
        doubled = copy.copy(self)
        factor = math.sqrt(2) if self.use_rslora else 2
        doubled.r = 2 * self.r
        doubled.lora_alpha = factor * self.lora_alpha  # type: ignore[assignment]
        doubled.rank_pattern = {name: 2 * rank for name, rank in (self.rank_pattern or {}).items()}
        doubled.alpha_pattern = {name: factor * alpha for name, alpha in (self.alpha_pattern or {}).items()}
        LoraConfig.save_pretrained(doubled, save_directory, **options)


def started_config(config: LoraConfig, adapter_name: str, form: Form) -> StartedLoraConfig:
    """The same config, saying that its adapter started from factors."""
    started = copy.copy(config)
    started.__class__ = StartedLoraConfig
    assert isinstance(started, StartedLoraConfig)
    started.started_from, started.form = adapter_name, form
    return started


def start_layer(layer: Layer, adapter_name: str, A: Tensor, B: Tensor, form: Form, name: str) -> None:
    """Start one adapter of a layer from A (r, in_features) and B (out_features, r), which sBA ≈ W.

    name: the layer's, for a warning.
    """
    _install(layer, adapter_name, A, B, form)
    if form == "residual":
        A, B = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        _subtract(layer, A, layer.scaling[adapter_name] * B.float(), name)


def started_adapters(layer: Layer, names: Any) -> list[str]:
    """Those of these adapters of a layer that started from factors in the residual form: R + sBA is what they mean."""
    return [name for name in names if name in layer.lora_A and type(layer.lora_A[name]) is StartedA]


def _install(layer: Layer, adapter_name: str, A: Tensor, B: Tensor, form: Form) -> None:
    of_A, of_B = (DeltaA, DeltaB) if form == "delta" else (StartedA, StartedB)
    for modules, of, values in ((layer.lora_A, of_A, A), (layer.lora_B, of_B, B)):
        modules[adapter_name] = _started(modules[adapter_name], of, values, device_of(layer.get_base_layer()))
    layer.resolve_lora_variant = partial(_resolve_lora_variant, layer)
    if form == "delta":
        layer.lora_variant[adapter_name] = DeltaVariant()
        layer.get_delta_weight = partial(_get_delta_weight, layer)
    else:
        layer.lora_variant.pop(adapter_name, None)


@torch.no_grad()
def _started(linear: nn.Linear, of: type[Started], values: Tensor, device: torch.device) -> Started:
    """The module in the place of PEFT's own, with the same parameter, which an optimizer may know already."""
    assert isinstance(linear.weight, nn.Parameter)
    weight = linear.weight
    if weight.is_meta:
        weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device), weight.requires_grad)
    weight.copy_(values)
    return of(weight, weight.detach(), linear.bias, persistent=True).train(linear.training)


class DeltaVariant(LoraVariant):
    """The delta form in PEFT's terms. The forward pass is a LoRA's, since `lora_A` and `lora_B` do the rest."""

    def supports_lora_conversion(self) -> bool:
        return True

    @staticmethod
    def init(module: Layer, adapter_name: str, *, config: LoraConfig, **_: Any) -> None:  # type: ignore[override]
        """Start an adapter that was added with another one's config from the same factors."""
        _start_as(module, adapter_name, config)

    @staticmethod
    def forward(module: Layer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if not isinstance(lora_A, DeltaA):
            raise OptionError(
                f"adapter {active_adapter!r}: something has replaced lora_A since it was started from factors (PEFT's "
                f"prepare_model_for_compiled_hotswap does); save it, and do that with the plain LoRA which that writes"
            )
        update: Tensor = lora_B(lora_A(module.lora_dropout[active_adapter](x)))
        total: Tensor = result + module.scaling[active_adapter] * update
        return total

    @staticmethod
    def merge_safe(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(orig_weight, _delta_weight(module, active_adapter))

    @staticmethod
    def merge_unsafe(module: Layer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = _plus(orig_weight.data, _delta_weight(module, active_adapter))

    @staticmethod
    def unmerge(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(orig_weight.data, -_delta_weight(module, active_adapter))


class ResidualVariant(LoraVariant):
    """Only while an adapter is added with a residual one's config: then it is as plain a LoRA as that one."""

    @staticmethod
    def init(module: Layer, adapter_name: str, *, config: LoraConfig, **_: Any) -> None:  # type: ignore[override]
        _start_as(module, adapter_name, config)


def _start_as(layer: Layer, adapter_name: str, config: LoraConfig) -> None:
    assert isinstance(config, StartedLoraConfig)
    source = config.started_from
    if source not in layer.lora_A or not isinstance(layer.lora_A[source], StartedA):
        raise OptionError(
            f"adapter {adapter_name!r}: its config starts it from the factors of adapter {source!r}, which is gone; "
            f"make a new LoraConfig and call initialize_peft"
        )
    A, B = layer.lora_A[source].initial, layer.lora_B[source].initial
    if layer.lora_A[adapter_name].weight.shape != A.shape:
        raise OptionError(
            f"adapter {adapter_name!r}: its config starts it from the factors of {source!r}, of rank {A.shape[0]}, "
            f"but asks for rank {layer.r[adapter_name]}; make a new LoraConfig and call initialize_peft"
        )
    assert config.form is not None
    _install(layer, adapter_name, A, B, config.form)


def _resolve_lora_variant(layer: Layer, *, config: LoraConfig, **options: Any) -> LoraVariant | None:
    if isinstance(config, StartedLoraConfig) and config.started_from is not None:
        return DeltaVariant() if config.form == "delta" else ResidualVariant()
    variant: LoraVariant | None = type(layer).resolve_lora_variant(layer, config=config, **options)
    return variant


def _get_delta_weight(layer: Layer, adapter: str, *others: Any, **options: Any) -> Tensor:
    if not isinstance(layer.lora_A[adapter], DeltaA):
        other: Tensor = type(layer).get_delta_weight(layer, adapter, *others, **options)
        return other
    return _delta_weight(layer, adapter).to(layer.lora_B[adapter].weight.dtype)


@torch.no_grad()
def _delta_weight(layer: Layer, adapter_name: str) -> Tensor:
    """s(BA − B0A0), float32, oriented as the base layer stores W."""
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if lora_A.swapped():
        A, B = lora_A.weight, lora_B.weight
    else:
        A, B = difference(lora_A.weight, lora_B.weight, lora_A.initial, lora_B.initial)
    product: Tensor = layer.scaling[adapter_name] * (B.float() @ A.float())
    return product.T if is_conv1d(layer.get_base_layer()) else product


def _plus(weight: Tensor, update: Tensor) -> Tensor:
    return (weight.float() + update.to(weight.device)).to(weight.dtype).contiguous()


@torch.no_grad()
def _subtract(layer: Layer, A: Tensor, scaled_B: Tensor, name: str) -> None:
    """R = W − sBA in W's place, with A and B as they are in the layer, in whatever dtype it keeps them.

    The layer keeps both factors, to stand in for W wherever R without its adapter would be wrong.
    """
    base_layer = layer.get_base_layer()
    weight: Tensor = base_layer.weight.data
    residual = _plus(weight, -_oriented(base_layer, scaled_B.float() @ A.float()))
    warn_if_rounded_away(weight, residual, name)
    base_layer.weight.data = residual
    layer.register_buffer("subtracted_A", A.float().clone(), persistent=False)
    layer.register_buffer("subtracted_B", scaled_B.float().clone(), persistent=False)
    layer.register_forward_hook(_restore_output, with_kwargs=True)
    layer.unload_and_optionally_merge_module = partial(_unload, layer)
    layer.supports_lora_conversion = _no_conversion


def is_residual(layer: Layer) -> bool:
    """Whether the layer's base weight is R."""
    return "subtracted_A" in layer._buffers


def _oriented(base_layer: nn.Module, product: Tensor) -> Tensor:
    return product.T if is_conv1d(base_layer) else product


def _restore_output(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Add s·B0A0x for every adapter in effect other than one, since R + sBA is W + s(BA − B0A0) for exactly one.

    None: the adapter is disabled, deleted, or another one is active on this base, and Wx is what they expect.
    """
    names = kwargs.get("adapter_names")
    x: Tensor = args[0] if args else kwargs["x"]
    if names is not None:
        missing = [not started_adapters(layer, [name]) for name in names]
        if not any(missing):
            return output
        share = torch.tensor(missing, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))
        return (output + _subtracted(layer, x * share)).to(output.dtype)
    if layer.disable_adapters:
        in_effect = []
    else:
        in_effect = started_adapters(layer, layer.merged_adapters if layer.merged else layer.active_adapters)
    if len(in_effect) == 1:
        return output
    return (output + (1 - len(in_effect)) * _subtracted(layer, x)).to(output.dtype)


def _subtracted(layer: Layer, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(layer.subtracted_A.dtype)
    return F.linear(F.linear(x, layer.subtracted_A), layer.subtracted_B)


@torch.no_grad()
def _unload(layer: Layer, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """The base layer with the adapters merged, or with W in R's place again, to R's rounding."""
    if merge:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    base_layer: nn.Module = layer.get_base_layer()
    missing = 1 - len(started_adapters(layer, layer.merged_adapters))
    if missing:
        product = _oriented(base_layer, layer.subtracted_B @ layer.subtracted_A)
        base_layer.weight.data = _plus(base_layer.weight.data, missing * product)  # type: ignore[arg-type]
    return base_layer


def _no_conversion(adapter_name: str = "default") -> bool:
    return False  # peft would convert BA, which belongs to R; save_pretrained writes what belongs to W
