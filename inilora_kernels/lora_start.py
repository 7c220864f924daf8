"""One line for a training script: takes a model, returns a PeftModel that starts from the model's own weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .adapters.base import require_original
from .adapters.experts import expert_shapes
from .adapters.live_model import model_config
from .adapters.modules import find_starts, is_conv1d, linear_shape
from .adapters.peft import initialize_peft
from .adapters.peft_check import require_no_adapters
from .adapters.plan import common_scaling, lora_config
from .adapters.rehearsal import WITHOUT_PEFT
from .adapters.weights import has_weight_of, require_unpacked, with_shared
from .approximate import approximate_model
from .choices import TASK_TYPES, Form
from .errors import InitializationError, OptionError, TargetError
from .factor_set import FactorSet, factor_set
from .suggestions import require_choice
from .torch_defaults import trainable_tensors


@trainable_tensors()
def lora_model(
    model: nn.Module,
    factors: FactorSet | str | Path | int | None = None,
    form: Form = "delta",
    *,
    rank: int | None = None,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: str | None = None,
) -> PeftModel:
    """Return a PeftModel whose LoRA starts from the factors, ready for any trainer; its output is still the model's.

    A LoraConfig from the factors, `get_peft_model` and `initialize_peft` in one call, with all their checks.

    model: any model whose linear layers are the checkpoint's, also a quantized one (delta form). It is changed in
        place, as `get_peft_model` does, and is as it was if this raises.
    factors: a FactorSet, the path of a factor file, or a rank: then they are computed from the model itself, by
        `approximate_model` with solver="krylov".
    rank: the same as a number for `factors`; one of the two must be given.
    form: "delta" leaves the base weights as they are; "residual" puts R = W − sBA into them.
    lora_alpha: PEFT's; None for a scaling s of 1, as in the paper. A and B are divided by √s, so sBA stays the same.
    use_rslora, lora_dropout, task_type: PEFT's.

    `save_pretrained`, which every trainer calls, writes a plain LoRA of rank 2r for the original model.

    Raises what `initialize_peft` and `FactorSet.load` raise, for a rank what `approximate_model` raises, and
    OptionError for a model that has adapters already.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential()
    >>> model.add_module("q_proj", nn.Linear(8, 6)); model.add_module("v_proj", nn.Linear(6, 6))
    >>> x = torch.randn(2, 8)
    >>> expected = model(x)
    >>> started = lora_model(model, rank=2)
    >>> torch.equal(started(x), expected), started.peft_config["default"].r
    (True, 2)
    """
    if (factors is None) == (rank is None):
        raise OptionError("lora_model: give either factors or a rank, as lora_model(model, rank=8)")
    factors = rank if factors is None else factors
    require_original(model)
    require_no_adapters(model)
    if isinstance(factors, int):
        factors = approximate_model(model, rank=factors, solver="krylov")
    assert factors is not None
    factors = factor_set(factors)
    config = lora_config_of(
        model, factors, lora_alpha=lora_alpha, use_rslora=use_rslora, lora_dropout=lora_dropout, task_type=task_type
    )
    peft_model = _with_adapters(model, config)
    try:
        return initialize_peft(peft_model, factors, form)
    except InitializationError:
        peft_model.unload()
        raise


def _with_adapters(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`get_peft_model`; where PEFT refuses a module, after it has adapted others, the model is put back."""
    try:
        peft_model = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, LoraLayer) and not isinstance(module, LoraLayer):
                    setattr(module, name, child.get_base_layer())
        raise TargetError(
            f"{type(model).__name__}: PEFT does not take these modules ({' '.join(str(error).split())[:300]}); make "
            f"the factors again without them, or {WITHOUT_PEFT}"
        ) from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def lora_config_of(
    model: nn.Module,
    factors: FactorSet | str | Path,
    *,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: str | None = None,
) -> LoraConfig:
    """Return the LoraConfig that `initialize_peft` needs for these factors, for building the PeftModel yourself.

    Names are the model's own: parts of a fused weight (`c_attn:query`) are one target of their ranks' sum, and modules
    of another rank are in rank_pattern and alpha_pattern, so that all have the same scaling. Parameters are those of
    `lora_model`. Raises OptionError, TargetError where the model lacks a module of the
    factors, and WeightError where a module's weight is packed until the model first runs.
    """
    if lora_alpha is not None and not lora_alpha > 0:
        raise OptionError(f"lora_alpha={lora_alpha}: give a number above 0, or leave it out for a scaling of 1")
    if task_type is not None:
        require_choice("task_type", task_type, TASK_TYPES)
    require_original(model)
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, ...]] = {
        name: shape for name, module in modules.items() if name and (shape := linear_shape(module))
    }
    experts = expert_shapes(model)
    factors = factor_set(factors)
    fits = partial(has_weight_of, model, factors)
    starts = find_starts(shapes | experts, factors, type(model).__name__, model_config(model), fits=fits, model=model)
    starts = with_shared(starts, model, shapes)
    require_unpacked(model, starts)
    ranks = {name: start.rank for name, start in starts.items()}
    scaling = common_scaling(ranks, lora_alpha, use_rslora)
    settings: dict[str, Any] = lora_config(ranks, scaling, use_rslora, list(modules), experts)
    if settings["target_parameters"] and lora_dropout:
        raise OptionError(f"lora_dropout={lora_dropout}: PEFT has no dropout for experts; leave it out")
    return LoraConfig(
        **{name: value for name, value in settings.items() if name != "peft_type"}
        | {
            "inference_mode": False,
            "lora_dropout": lora_dropout,
            "task_type": task_type,
            "fan_in_fan_out": any(is_conv1d(modules[name]) for name in ranks if name in modules),
        }
    )
