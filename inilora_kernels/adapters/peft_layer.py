"""One of PEFT's LoRA layers, started from factors: what its parts become, and the form that it is in.

PEFT's layers are taken as they are. `lora_A` and `lora_B` become modules that know A0 and B0, which is all that the
forward pass needs in the delta form. Everything else goes through PEFT's own seams: a LoraVariant for merging, and the
config, which says that an adapter added with it starts from the same factors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from ..choices import Form
from ..errors import OptionError
from .residual_base import Layer, is_residual, require_still_started, subtract, take_for_residual
from .started import DeltaA, DeltaB, Started, StartedA, StartedB, difference
from .weights import device_of, oriented, plus, require_summable


@dataclass
class StartedLoraConfig(LoraConfig):
    """The LoraConfig of an adapter that started from factors.

    An adapter added with it, as TRL's trainers add "ref", starts from the same factors; a model without these factors
    refuses it, as PEFT refuses any variant that its layers lack. On disk it is the config of the plain LoRA of rank
    2r that `save_pretrained` writes.

    started_from: the adapter that has the factors. form: its form.
    """

    started_from: str | None = field(default=None, metadata={"is_lora_variant": True})
    form: Form | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {name: value for name, value in values.items() if name not in ("started_from", "form")}

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write adapter_config.json for twice the rank and the same scaling."""
        config = self if self.started_from is None else self.doubled()
        LoraConfig.save_pretrained(config, save_directory, **options)

    def doubled(self) -> StartedLoraConfig:
        """The config of the plain LoRA of twice the rank and the same scaling."""
        doubled = copy.copy(self)
        doubled.started_from = doubled.form = None
        doubled.init_lora_weights = True  # what a program has put there since, "pissa" say, would change W on loading
        factor = math.sqrt(2) if self.use_rslora else 2
        doubled.r = 2 * self.r
        doubled.lora_alpha = factor * self.lora_alpha  # type: ignore[assignment]
        doubled.rank_pattern = {name: 2 * rank for name, rank in (self.rank_pattern or {}).items()}
        doubled.alpha_pattern = {name: factor * alpha for name, alpha in (self.alpha_pattern or {}).items()}
        return doubled


def halved(config: LoraConfig) -> LoraConfig:
    """The trainable config of half the rank and the same scaling: what `doubled` has doubled."""
    half = copy.copy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    half.r = config.r // 2
    half.lora_alpha = config.lora_alpha / factor  # type: ignore[assignment]
    half.rank_pattern = {name: rank // 2 for name, rank in (config.rank_pattern or {}).items()}
    half.alpha_pattern = {name: alpha / factor for name, alpha in (config.alpha_pattern or {}).items()}
    half.init_lora_weights, half.inference_mode = True, False
    return half


def started_config(config: LoraConfig, adapter_name: str, form: Form) -> StartedLoraConfig:
    """The same config, saying that its adapter started from factors."""
    started = copy.copy(config)
    started.__class__ = StartedLoraConfig
    assert isinstance(started, StartedLoraConfig)
    started.started_from, started.form = adapter_name, form
    return started


def start_layer(layer: Layer, adapter_name: str, A: Tensor, B: Tensor, form: Form, name: str) -> None:
    """Start one adapter of a layer from A (r, in_features) and B (out_features, r), with sBA ≈ W.

    name: the layer's, for a warning.
    """
    _install(layer, adapter_name, A, B, form)
    if form == "residual":
        subtract(layer, adapter_name, name)


def start_on_residual(layer: Layer, adapter_name: str, A: Tensor, B: Tensor) -> None:
    """The same for a layer whose base weight is W − sBA already."""
    _install(layer, adapter_name, A, B, "residual")
    take_for_residual(layer, adapter_name)


def _install(layer: Layer, adapter_name: str, A: Tensor, B: Tensor, form: Form) -> None:
    of_A, of_B = (DeltaA, DeltaB) if form == "delta" else (StartedA, StartedB)
    for modules, of, values in ((layer.lora_A, of_A, A), (layer.lora_B, of_B, B)):
        modules[adapter_name] = _started(modules[adapter_name], of, values, device_of(layer.get_base_layer()))
    layer.started_as = {**getattr(layer, "started_as", {}), adapter_name: form}
    if "started_as" not in layer.other_param_names:  # what delete_adapter forgets
        layer.other_param_names = (*layer.other_param_names, "started_as")
    layer.resolve_lora_variant = partial(_resolve_lora_variant, layer)
    if form == "delta":
        layer.lora_variant[adapter_name] = DeltaVariant()
        layer.get_delta_weight = partial(_get_delta_weight, layer)
    else:
        layer.lora_variant.pop(adapter_name, None)


@torch.no_grad()
def _started(linear: nn.Linear, of: type[Started], values: Tensor, device: torch.device) -> Started:
    """The module that replaces PEFT's own, with the same parameter, which an optimizer may already know."""
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
        require_still_started(module, active_adapter)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        update: Tensor = lora_B(lora_A(module.lora_dropout[active_adapter](x)))
        total: Tensor = result + module.scaling[active_adapter] * update
        return total

    @staticmethod
    def merge_safe(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        require_summable(orig_weight, f"merge of adapter {active_adapter!r}")
        return plus(orig_weight, _delta_weight(module, active_adapter))

    @staticmethod
    def merge_unsafe(module: Layer, active_adapter: str, orig_weight: Tensor) -> None:
        require_summable(orig_weight, f"merge of adapter {active_adapter!r}")
        orig_weight.data = plus(orig_weight.data, _delta_weight(module, active_adapter))

    @staticmethod
    def unmerge(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return plus(orig_weight.data, -_delta_weight(module, active_adapter))


class ResidualVariant(LoraVariant):
    """Used only while an adapter is added with a residual one's config; after that it is a plain LoRA."""

    @staticmethod
    def init(module: Layer, adapter_name: str, *, config: LoraConfig, **_: Any) -> None:  # type: ignore[override]
        _start_as(module, adapter_name, config)


def _start_as(layer: Layer, adapter_name: str, config: LoraConfig) -> None:
    if not isinstance(config, StartedLoraConfig):
        raise OptionError(
            f"adapter {adapter_name!r}: one of this name has started from factors already; call unload() or "
            f"delete_adapter first, or take another name"
        )
    source = config.started_from
    if source not in layer.lora_A or not isinstance(layer.lora_A[source], StartedA) or layer.lora_A[source].swapped():
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
    if variant is not None and is_residual(layer):
        raise OptionError(
            f"{type(variant).__name__} computes with the base weight, which an adapter in the residual form has "
            f'replaced by R, so what it learns would fit R alone; start that one with form="delta"'
        )
    return variant


def _get_delta_weight(layer: Layer, adapter: str, *others: Any, **options: Any) -> Tensor:
    if layer.started_as.get(adapter) != "delta":
        other: Tensor = type(layer).get_delta_weight(layer, adapter, *others, **options)
        return other
    return _delta_weight(layer, adapter).to(layer.lora_B[adapter].weight.dtype)


@torch.no_grad()
def _delta_weight(layer: Layer, adapter_name: str) -> Tensor:
    """s(BA − B0A0), float32, oriented as the base layer stores W."""
    require_still_started(layer, adapter_name)
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if lora_A.weight.shape != lora_A.initial.shape:  # swapped in by PEFT, of another rank
        A, B = lora_A.weight, lora_B.weight
    else:
        A, B = difference(lora_A.weight, lora_B.weight, lora_A.initial, lora_B.initial)
    product: Tensor = layer.scaling[adapter_name] * (B.float() @ A.float())
    return oriented(layer.get_base_layer(), product)
