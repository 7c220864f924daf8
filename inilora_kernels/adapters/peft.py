"""Factors into a live PeftModel, so that any trainer that takes one trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from ..errors import OptionError, TargetError
from ..factor_set import FactorSet
from .layer import Form, difference, model_config, require_plain_weight, warn_if_rounded_away
from .modules import Start, find_starts, is_conv1d

# A peft layer is an nn.Module as well as a LoraLayer, for which there is no one type.
Layer = Any
_RESIDUAL = "_inilora_residual"


def initialize_peft(
    peft_model: PeftModel, factors: FactorSet, form: Form = "delta", adapter_name: str = "default"
) -> PeftModel:
    """Start a PeftModel's LoRA adapter from the factors, in place, without changing the model's output.

    Call it after `get_peft_model` with `init_lora_weights=True` (the default) and before training, in the place where
    `initialize_lora_eva_weights` stands for EVA. Every module that the adapter targets needs factors of its rank, and
    the other way round. lora_alpha, use_rslora, rank_pattern, alpha_pattern and fan_in_fan_out are the
    LoraConfig's: with PEFT's scaling s, A and B are divided by √s, so sBA ≈ W whatever s is.

    form: "delta" leaves the base weights as they are, exact in any dtype and on quantized bases; the
        forward pass subtracts the frozen start, [B, B − B0] [A − A0; A0] x. "residual" puts R = W − sBA into the base
        weights, as PEFT's PiSSA does, and leaves PEFT's forward pass alone.

    What `save_pretrained` writes is A and B alone in both forms: meaningful together with the factors. `convert`
    makes a plain LoRA for the original base of it.

    Returns the model. Raises TargetError (no such module, no factors for a module, a shape differs), OptionError (no
    such adapter, rank differs, DoRA or another variant, an initialization that has changed the base, the delta form
    where Unsloth's or Axolotl's kernels pass by PEFT's forward) and WeightError (residual form of a quantized or
    sharded weight); nothing is changed then.

    >>> import peft
    >>> from inilora_kernels.factors import Certificate, Factors
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> x = torch.randn(2, 4)
    >>> expected = base(x)
    >>> start = Factors(torch.randn(1, 4), torch.randn(3, 1), Certificate(0.0, 0.0, 1.0, 0), source_sha256="")
    >>> model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=16, target_modules=["0"]))
    >>> torch.equal(initialize_peft(model, FactorSet({"0": start}, {}))(x), expected)
    True
    """
    if form not in ("delta", "residual"):
        raise OptionError(f'form={form!r}: it is "delta" or "residual"')
    if form == "delta":
        _require_forward_of_peft(peft_model)
    layers, starts = _matched(peft_model, factors, adapter_name)
    scaled = {}
    for name, start in starts.items():
        _require_plain_lora(layers[name], name, start, adapter_name)
        scaled[name] = start.scaled(layers[name].scaling[adapter_name])
        if form == "residual":
            _require_untouched(layers[name].get_base_layer(), name)
    for name, (A, B) in scaled.items():
        layer = layers[name]
        _put(layer.lora_A[adapter_name], A)
        _put(layer.lora_B[adapter_name], B)
        if form == "delta":
            _start_from(layer, adapter_name, A, B)
        else:
            layer.lora_variant.pop(adapter_name, None)
            _subtract(layer, adapter_name, name)
    return peft_model


def load_delta(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load what `export_delta` wrote, ready to train: a PeftModel whose output is still that of `model`.

    folder: with `adapter` and `initial` in it.

    Raises what peft raises for a folder that is none.
    """
    folder = Path(folder)
    peft_model = PeftModel.from_pretrained(model, str(folder / "adapter"), adapter_name=adapter_name, is_trainable=True)
    for _, layer in _lora_layers(peft_model, adapter_name):
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        _start_from(layer, adapter_name, A.detach(), B.detach())
    return peft_model


class _Delta(LoraVariant):
    """The delta form in PEFT's terms; A0 and B0 are buffers of the layer that its state dict leaves out."""

    def supports_lora_conversion(self) -> bool:
        return False  # peft would convert BA, not BA − B0A0; our `convert` does it right

    @staticmethod
    def init(module: Layer, adapter_name: str, **_: Any) -> None:
        """Nothing: `_start_from` has put everything in its place."""

    @staticmethod
    def forward(module: Layer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        A, B = _difference(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        scaling: float = module.scaling[active_adapter]
        return result + scaling * F.linear(F.linear(x, A), B)

    @staticmethod
    def merge_safe(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(orig_weight, _delta_weight(module, active_adapter))

    @staticmethod
    def merge_unsafe(module: Layer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = _plus(orig_weight.data, _delta_weight(module, active_adapter))

    @staticmethod
    def unmerge(module: Layer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(orig_weight.data, -_delta_weight(module, active_adapter))


def _start_from(layer: Layer, adapter_name: str, A: Tensor, B: Tensor) -> None:
    for factor, initial in (("A", A), ("B", B)):
        weight = getattr(layer, f"lora_{factor}")[adapter_name].weight
        layer.register_buffer(f"initial_{factor}_{adapter_name}", initial.to(weight, copy=True), persistent=False)
    layer.lora_variant[adapter_name] = _Delta()


def _difference(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor]:
    return difference(
        layer.lora_A[adapter_name].weight,
        layer.lora_B[adapter_name].weight,
        layer.get_buffer(f"initial_A_{adapter_name}"),
        layer.get_buffer(f"initial_B_{adapter_name}"),
    )


@torch.no_grad()
def _delta_weight(layer: Layer, adapter_name: str) -> Tensor:
    """s(BA − B0A0), float32, the way round in which the base layer stores W."""
    A, B = _difference(layer, adapter_name)
    product: Tensor = layer.scaling[adapter_name] * (B.float() @ A.float())
    return product.T if is_conv1d(layer.get_base_layer()) else product


def _plus(weight: Tensor, update: Tensor) -> Tensor:
    return (weight.float() + update).to(weight.dtype).contiguous()


def _matched(peft_model: PeftModel, factors: FactorSet, adapter_name: str) -> tuple[dict[str, Layer], dict[str, Start]]:
    if adapter_name not in getattr(peft_model, "peft_config", {}):
        there = ", ".join(getattr(peft_model, "peft_config", {})) or "none; call get_peft_model first"
        raise OptionError(f"no adapter {adapter_name!r} in this model; there is {there}")
    initialized = getattr(peft_model.peft_config[adapter_name], "init_lora_weights", True)
    if initialized not in (True, False, "gaussian"):
        raise OptionError(
            f"init_lora_weights={initialized!r} has set up this adapter already; "
            f"make the LoraConfig with init_lora_weights=True"
        )
    layers = dict(_lora_layers(peft_model, adapter_name))
    shapes = {name: (int(layer.out_features), int(layer.in_features)) for name, layer in layers.items()}
    starts = find_starts(shapes, factors, type(peft_model).__name__, model_config(peft_model))
    without = [name for name in layers if name not in starts]
    if without:
        raise TargetError(
            f"target_modules selects {without[0]} and {len(without) - 1} more that have no factors; name the modules "
            f"that were factorized, or factorize these too"
        )
    return layers, starts


def _lora_layers(peft_model: PeftModel, adapter_name: str) -> list[tuple[str, Layer]]:
    return [
        (name, module)
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    ]


def _require_plain_lora(layer: Layer, name: str, start: Start, adapter_name: str) -> None:
    rank = layer.r[adapter_name]
    if rank != start.rank:
        raise OptionError(
            f"{name}: the LoraConfig gives rank {rank}, the factors ({', '.join(start.names)}) have {start.rank}; "
            f"set r={start.rank}, or rank_pattern for this module alone"
        )
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if layer.use_dora.get(adapter_name) or (variant is not None and not isinstance(variant, _Delta)):
        raise OptionError(f"{name}: factors start a plain LoRA, not DoRA or another variant; turn that off")


def _require_forward_of_peft(model: nn.Module) -> None:
    """Unsloth and Axolotl put functions named apply_lora_qkv, apply_lora_o and so on into the modules they patch."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if getattr(value, "__name__", "").startswith("apply_lora_"):
                raise OptionError(
                    f"{name}.{attribute} is {value.__name__} of {value.__module__}, which reads A and B alone and "
                    f'would add BAx without subtracting B0A0x; use form="residual"'
                )


def _require_untouched(base_layer: nn.Module, name: str) -> None:
    require_plain_weight(base_layer, name, 'use form="delta", which leaves the base as it is')
    if getattr(base_layer, _RESIDUAL, False):
        raise OptionError(
            f"{name}: the base weight is a residual already, and another adapter belongs to it; load the model anew, "
            f'or use form="delta" for several adapters on one base'
        )


@torch.no_grad()
def _put(linear: nn.Linear, values: Tensor) -> None:
    linear.weight.copy_(values)


@torch.no_grad()
def _subtract(layer: Layer, adapter_name: str, name: str) -> None:
    """R = W − sBA in W's place, with A and B as they are in the layer, in whatever dtype it keeps them."""
    base_layer = layer.get_base_layer()
    weight: Tensor = base_layer.weight.data
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    product = (layer.scaling[adapter_name] * (B.float() @ A.float())).to(weight.device)
    residual = _plus(weight, -(product.T if is_conv1d(base_layer) else product))
    warn_if_rounded_away(weight, residual, name)
    base_layer.weight.data = residual
    setattr(base_layer, _RESIDUAL, True)
