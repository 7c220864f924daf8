"""Whether a model can take adapters, and whether one of PEFT's layers keeps its output when it starts from factors.

The latter is tried on the layer itself, then undone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..choices import Form
from ..errors import OptionError, TargetError
from .peft_layer import start_layer
from .residual_base import Layer
from .weights import require_gradients, run_base


def require_no_adapters(model: nn.Module) -> None:
    """Raise OptionError if a model has PEFT's adapters, which `get_peft_model` would start anew under their name."""
    found = next((name for name, one in model.named_modules() if isinstance(one, (PeftModel, BaseTunerLayer))), None)
    if found is not None:
        raise OptionError(
            f"{found or type(model).__name__} has PEFT's adapters already, which this would overwrite, trained or not; "
            f"go on with that PeftModel (initialize_peft starts a further adapter of it), or call its "
            f"merge_and_unload() or unload() first"
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """What a start changes in a layer, as it was: to put it back."""

    attributes: dict[str, Any]
    tables: dict[str, dict[Any, Any]]
    modules: tuple[nn.Module, nn.Module]
    values: tuple[Tensor, Tensor]
    base_weight: Tensor | None


_TABLES = ("_buffers", "_forward_hooks", "_forward_hooks_with_kwargs", "lora_variant")


def parts_of(layer: Layer, adapter_name: str) -> Parts:
    modules = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
    weight = getattr(layer.get_base_layer(), "weight", None)
    return Parts(
        attributes=dict(vars(layer)),
        tables={table: dict(getattr(layer, table)) for table in _TABLES},
        modules=modules,
        values=(modules[0].weight.detach().clone(), modules[1].weight.detach().clone()),
        base_weight=weight.data if isinstance(weight, Tensor) else None,
    )


@torch.no_grad()
def put_back(layer: Layer, adapter_name: str, parts: Parts) -> None:
    for added in vars(layer).keys() - parts.attributes.keys():
        delattr(layer, added)
    layer.__dict__.update(parts.attributes)
    for table, entries in parts.tables.items():
        there = getattr(layer, table)
        there.clear()
        there.update(entries)
    for linears, module, values in zip((layer.lora_A, layer.lora_B), parts.modules, parts.values, strict=True):
        linears[adapter_name] = module
        module.weight.copy_(values)  # type: ignore[operator]
    if parts.base_weight is not None and layer.get_base_layer().weight.data is not parts.base_weight:
        layer.get_base_layer().weight.data = parts.base_weight


@torch.no_grad()
def require_layer_unchanged(layer: Layer, name: str, A: Tensor, B: Tensor, form: Form, adapter_name: str) -> None:
    """Start the layer, compare its output on random input with its base layer's, and undo the start.

    Raises TargetError if it differs by more than rounding, or if a quantized base layer passes no gradients. A layer
    that cannot be run here (sharded, or with another device's kernels) is trusted.
    """
    base_layer = layer.get_base_layer()
    found = run_base(base_layer, A.shape[1])
    if found is None:
        return
    require_gradients(base_layer, name)
    x, expected = found
    parts = parts_of(layer, adapter_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the start that is kept warns
            start_layer(layer, adapter_name, A, B, form, name)
        with _only(layer, adapter_name):
            output = layer(x)
    finally:
        put_back(layer, adapter_name, parts)
    product = F.linear(F.linear(x.float().cpu(), A.float().cpu()), B.float().cpu()) * layer.scaling[adapter_name]
    size = float(expected.double().norm()) + (float(product.double().norm()) if form == "residual" else 0.0)
    dtypes = (expected.dtype, x.dtype, layer.lora_A[adapter_name].weight.dtype)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    difference = float((output.double() - expected.double()).norm())
    # Two sums of rounded products, each of at most that size, whose order may differ from call to call.
    if not difference <= 16 * eps * size:
        raise TargetError(
            f"{name}: with the factors the output of {type(layer).__module__}.{type(layer).__name__} on random input "
            f"changes by {difference / (size or 1.0):.1%}: its forward pass reads A and B by itself; "
            + ('use form="residual"' if form == "delta" else "leave the module out of target_modules")
        )


@contextmanager
def disabled(layers: Iterable[Layer]) -> Iterator[None]:
    """Switch these layers' adapters off, without PEFT's change to what is trainable."""
    layers = list(layers)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def _only(layer: Layer, adapter_name: str) -> Iterator[None]:
    """This adapter active and no other, without dropout, on a base layer that stays trainable; see `run_base`."""
    active, off, dropout = layer._active_adapter, layer._disable_adapters, layer.lora_dropout[adapter_name]
    base_layer = layer.get_base_layer()
    training = dropout.training, base_layer.training
    try:
        layer._active_adapter, layer._disable_adapters = [adapter_name], False
        dropout.training, base_layer.training = False, True
        yield
    finally:
        layer._active_adapter, layer._disable_adapters = active, off
        dropout.training, base_layer.training = training
