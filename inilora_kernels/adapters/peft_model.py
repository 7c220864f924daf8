"""What a PeftModel that started from factors does differently: saving, and putting adapters to use and together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..errors import OptionError
from .peft_layer import StartedLoraConfig, started_config
from .residual_base import Layer
from .started import Started, unwrapped
from .weights import require_unshared_weight, users_of_weights
from .wrappers import in_state_dict, own_names, without_wrappers

# What PEFT's initializations do to A and B alone.
_LEAVES_THE_BASE = frozenset({"gaussian", "orthogonal", "eva", "mica"})


def save_and_combine_what_was_learned(peft_model: PeftModel) -> None:
    """Let the model's own `save_pretrained`, `state_dict` and `add_weighted_adapter` take s(BA − B0A0) for an adapter,
    and let no plain LoRA with a copy of A and B come into use, nor the base be saved with adapters in it.

    `save_pretrained`, which every trainer calls, writes [A − A0; A0] and [B, B − B0] of rank 2r. Their product is what
    was learned in both forms, and belongs to W: it is fit for any program that loads LoRAs, also in 16 bits, since
    nothing cancels in it. A and B alone would be mistaken for a LoRA of W, and add W's own low-rank part a second time.
    `state_dict` is where PEFT's `get_peft_model_state_dict` takes A and B from, for programs that save or send them by
    themselves.
    """
    model: Any = peft_model  # methods of one object, for which there is no type
    model.save_pretrained = partial(_save_pretrained, model)
    model.state_dict = partial(_state_dict, model)
    model.load_state_dict = partial(_load_state_dict, model)
    model.load_adapter = partial(_load_adapter, model)
    base: Any = peft_model.get_base_model()
    if callable(getattr(base, "save_pretrained", None)):
        base.save_pretrained = partial(_save_base, base)
    tuner: Any = peft_model.base_model
    tuner.add_weighted_adapter = partial(_add_weighted_adapter, tuner)
    tuner.inject_adapter = partial(_inject_adapter, tuner)
    tuner.set_adapter = partial(_set_adapter, tuner)
    tuner.merge_adapter = partial(_merge_adapter, tuner)
    tuner._unload_and_optionally_merge = partial(_unload_and_optionally_merge, tuner)
    tuner._enable_peft_forward_hooks = partial(_enable_peft_forward_hooks, tuner)


def _save_pretrained(peft_model: PeftModel, save_directory: str, *args: Any, **options: Any) -> None:
    """PeftModel.save_pretrained; state_dict, where given, is the gathered one of a sharded model.

    Names are those of the model itself, also where torch.compile has wrapped it, its base or its layers.
    """
    options.pop("path_initial_model_for_weight_conversion", None)  # the start, which the file subtracts already
    given = options.pop("state_dict", None)
    state_dict = own_names(peft_model, peft_model.state_dict() if given is None else given)
    with without_wrappers(peft_model):
        _save_under_own_names(peft_model, save_directory, state_dict, *args, **options)


def _save_under_own_names(
    peft_model: PeftModel, save_directory: str, state_dict: dict[str, Any], *args: Any, **options: Any
) -> None:
    _double(peft_model, state_dict)
    for key, started in _started(peft_model).items():
        state_dict.pop(f"{key}.{started.start_name}", None)
        if started.swapped():
            raise OptionError(
                f"{key}: PEFT's hotswap has put another adapter here since this one was started from factors, and the "
                f"config is still the old one's; copy the folder that was swapped in"
            )
    selected = options.get("selected_adapters") or list(peft_model.peft_config)
    for name in selected:
        # Processes other than the one that saves may have gathered nothing.
        if state_dict and not get_peft_model_state_dict(
            peft_model, dict(state_dict), name, save_embedding_layers=False
        ):
            raise OptionError(
                f"adapter {name!r}: PEFT finds none of its tensors in this state dict, and would write an empty one "
                f"(PEFT 0.21 under FSDP1, a plain LoRA's too); use FSDP2, or load the gathered state dict into a model "
                f"that is not sharded and save that"
            )
    for key in _started(peft_model):
        if state_dict and f"{key}.weight" not in state_dict and key.rpartition(".")[2] in selected:
            raise OptionError(
                f"{key}.weight is not in the state dict to save, which has other names or leaves it out; save by "
                f"save_pretrained without a state_dict, or give the model's own"
            )
    type(peft_model).save_pretrained(peft_model, save_directory, *args, state_dict=state_dict, **options)


def _save_base(base: Any, *args: Any, **options: Any) -> Any:
    """The base model's own save_pretrained, with a warning while its layers have adapters.

    transformers writes `base_layer.weight` then, and loads random numbers in its place. No error: this comes at the end
    of a training (Axolotl's DPO saves so, and its trainer the adapter besides).
    """
    state_dict = options.get("state_dict")
    wrapped = any(isinstance(module, LoraLayer) for module in base.modules())
    if wrapped and (state_dict is None or any(".base_layer." in key for key in state_dict)):
        warnings.warn(
            "save_pretrained of the base model under a PeftModel names its weights so that no model loads them; call "
            "the PeftModel's own save_pretrained for the adapter, or save what merge_and_unload() returns",
            stacklevel=2,
        )
    return type(base).save_pretrained(base, *args, **options)


def _state_dict(peft_model: PeftModel, *args: Any, **options: Any) -> Any:
    """nn.Module.state_dict, with [A − A0; A0] and [B, B − B0] where the model itself is asked, not as part of another.

    `load_state_dict` takes both. A shard of A stays as it is.
    """
    state_dict = type(peft_model).state_dict(peft_model, *args, **options)
    if not (args or options.get("destination") is not None or options.get("prefix")):
        _double(peft_model, state_dict)
    return state_dict


def _load_state_dict(peft_model: PeftModel, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """nn.Module.load_state_dict, which loads nothing where a weight has started elsewhere."""
    for key, started in _started(peft_model).items():
        started.require_loadable(state_dict, f"{key}.")
    return type(peft_model).load_state_dict(peft_model, state_dict, *args, **options)


def _load_adapter(peft_model: PeftModel, *args: Any, **options: Any) -> Any:
    """PeftModel.load_adapter of what `save_pretrained` wrote under the model's own names, also into a compiled one.

    PEFT alone writes the wrappers' names, so those of its folders are looked for too.
    """
    with without_wrappers(peft_model) as wrapped:
        result = type(peft_model).load_adapter(peft_model, *args, **options)
    if wrapped and result.missing_keys:
        result = type(peft_model).load_adapter(peft_model, *args, **options)
    return result


def _double(peft_model: PeftModel, state_dict: MutableMapping[str, Any]) -> None:
    for key, started in _started(peft_model).items():
        weight = state_dict.get(f"{key}.weight")
        if isinstance(weight, Tensor) and type(weight.data) is Tensor:
            state_dict[f"{key}.weight"] = started.doubled(weight)


def _started(peft_model: PeftModel) -> dict[str, Started]:
    """lora_A and lora_B of every adapter that started from factors, by their key in the model's state dict."""
    return {in_state_dict(name): module for name, module in peft_model.named_modules() if isinstance(module, Started)}


def _inject_adapter(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
    """BaseTuner.inject_adapter, by which every further adapter comes into the model: none that changes its weights.

    PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the base weights apart, for the adapters that are there already too.
    """
    method = getattr(tuner.peft_config[adapter_name], "init_lora_weights", True)
    if not (isinstance(method, bool) or method in _LEAVES_THE_BASE):
        raise OptionError(
            f"adapter {adapter_name!r}: init_lora_weights={method!r} changes base weights, and with them what the "
            f"adapters that started from factors compute; load it into a model of its own"
        )
    type(tuner).inject_adapter(tuner, model, adapter_name, *args, **options)
    config = tuner.peft_config[adapter_name]
    if isinstance(config, StartedLoraConfig) and config.started_from is not None:
        # It has the start itself now, and may outlive the adapter whose config this is.
        tuner.peft_config[adapter_name] = started_config(config, adapter_name, config.form or "delta")


def _require_unshared(tuner: Any, names: Iterable[str]) -> None:
    """Raise TargetError if the weight into which one of these adapters would be merged is another module's too."""
    users = users_of_weights(tuner.model)
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, LoraLayer) and any(adapter in getattr(layer, "started_as", {}) for adapter in names):
            base_layer = layer.get_base_layer()
            if isinstance(getattr(base_layer, "weight", None), nn.Parameter):
                require_unshared_weight(
                    users, name, base_layer, "merging", "load what save_pretrained writes next to the model"
                )


def _set_adapter(tuner: Any, adapter_name: str | list[str], *args: Any, **options: Any) -> None:
    _require_no_copies(tuner, adapter_name)
    type(tuner).set_adapter(tuner, adapter_name, *args, **options)


def _merge_adapter(tuner: Any, adapter_names: list[str] | None = None, *args: Any, **options: Any) -> None:
    names = adapter_names or tuner.active_adapters
    _require_no_copies(tuner, names)
    _require_unshared(tuner, names)
    type(tuner).merge_adapter(tuner, adapter_names, *args, **options)


def _unload_and_optionally_merge(tuner: Any, merge: bool = True, *args: Any, **options: Any) -> Any:
    """What merge_and_unload and unload do."""
    if merge:
        names = options.get("adapter_names") or tuner.active_adapters
        _require_no_copies(tuner, names)
        _require_unshared(tuner, names)
    return type(tuner)._unload_and_optionally_merge(tuner, merge, *args, **options)


def _enable_peft_forward_hooks(tuner: Any, *args: Any, **options: Any) -> Any:
    """What PeftModel enters for the adapters of a mixed batch."""
    _require_no_copies(tuner, options.get("adapter_names") or ())
    return type(tuner)._enable_peft_forward_hooks(tuner, *args, **options)


def _require_no_copies(tuner: Any, names: str | Iterable[str]) -> None:
    """Raise OptionError if one of these adapters is a plain LoRA into which A and B of a started one were copied.

    Its BA is near W's own low-rank part, which it would add a second time.
    """
    for name in {names} if isinstance(names, str) else dict.fromkeys(names):
        if getattr(tuner.peft_config.get(name), "started_from", None) is not None:
            continue
        for layer in tuner.model.modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                source = _copied(layer, name)
                if source is not None:
                    raise OptionError(
                        f"adapter {name!r}: a plain LoRA that holds A and B of {source!r}, which started from factors, "
                        f"so it would add W's own low-rank part once more; add it with the config that has the start, "
                        f"model.add_adapter({name!r}, model.peft_config[{source!r}]), and copy then"
                    )


def _copied(layer: Layer, name: str) -> str | None:
    """The started adapter of which this one is a copy, as far as both have the same shape."""
    sources: list[str] = list(layer.lora_A)
    for source in sources:
        started = unwrapped(layer.lora_A[source]), unwrapped(layer.lora_B[source])
        pairs = zip(started, (layer.lora_A[name], layer.lora_B[name]), strict=True)
        if all(one is not None and one.resembles(other.weight) for one, other in pairs):
            return source
    return None


def _add_weighted_adapter(tuner: Any, adapters: list[str], *args: Any, **options: Any) -> None:
    """LoraModel.add_weighted_adapter of the plain LoRAs that `save_pretrained` would write of these adapters."""
    _require_no_copies(tuner, adapters)
    with _as_plain_loras(tuner, adapters):
        type(tuner).add_weighted_adapter(tuner, adapters, *args, **options)


@contextmanager
def _as_plain_loras(tuner: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Put [A − A0; A0] and [B, B − B0] in the place of A and B, and the config of that rank, while it lasts."""
    configs = {name: tuner.peft_config[name] for name in adapters if name in tuner.peft_config}
    started = [name for name, config in configs.items() if getattr(config, "started_from", None) is not None]
    layers: list[Any] = [layer for layer in tuner.model.modules() if isinstance(layer, LoraLayer)]
    kept: list[tuple[str, Any]] = []
    try:
        for name in started:
            tuner.peft_config[name] = configs[name].doubled()
            for layer in layers:
                if name not in getattr(layer, "started_as", {}) or layer.lora_A[name].swapped():
                    continue
                tables = (layer.lora_A, layer.lora_B, layer.lora_variant, layer.started_as, layer.r)
                kept.append((name, [(table, table[name]) for table in tables if name in table]))
                _make_plain(layer, name)
        yield
    finally:
        tuner.peft_config.update(configs)
        for name, values in kept:
            for table, value in values:
                table[name] = value


def _make_plain(layer: Any, name: str) -> None:
    for modules in (layer.lora_A, layer.lora_B):
        weight = modules[name].doubled(modules[name].weight.detach())
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        modules[name] = plain
    layer.r[name] = layer.lora_A[name].out_features
    layer.lora_variant.pop(name, None)
    del layer.started_as[name]
