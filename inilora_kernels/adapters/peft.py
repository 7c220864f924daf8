"""Factors into a live PeftModel, which any trainer that accepts one can train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ..choices import FORMS, Form
from ..errors import FactorFileError, OptionError, TargetError, WeightError
from ..factor_set import FactorSet, factor_set
from ..storage.reading import is_there
from ..suggestions import require_choice, some
from ..torch_defaults import trainable_tensors
from .base import require_original, require_residual, sha256_of_file
from .experts import expert_shapes, name_of, require_expert_parameter, stacks, start_experts
from .folder import WEIGHTS, adapter_path, named_base, read_adapter
from .live_model import model_config, output_of, random_inputs, require_called, require_same_output
from .modules import Start, find_starts, linear_shape
from .peft_check import disabled, parts_of, put_back, require_layer_unchanged, require_no_adapters
from .peft_layer import DeltaVariant, halved, start_layer, start_on_residual, started_config
from .peft_model import save_and_combine_what_was_learned
from .rehearsal import require_peft_reads_back
from .residual_base import Layer, is_residual
from .started import StartedA, start_of
from .weights import (
    has_weight_of,
    require_own_weight,
    require_unpacked,
    require_unshared_weight,
    users_of_weights,
    warn_of_dropout,
    with_shared,
)

_GO_ON = (
    "go on with it by initialize_peft on a new adapter, then peft_model.load_adapter(folder, adapter_name, "
    "is_trainable=True)"
)

_GIVE = "give the folder that export_delta, or a model started from factors, has saved"


@trainable_tensors()
def initialize_peft(
    peft_model: PeftModel,
    factors: FactorSet | str | Path,
    form: Form = "delta",
    adapter_name: str = "default",
    overwrite: bool = False,
) -> PeftModel:
    """Start a PeftModel's LoRA adapter from the factors, in place, without changing the model's output.

    Call it after `get_peft_model` with `init_lora_weights=True` (the default) and before training, where
    `initialize_lora_eva_weights` goes for EVA. Every module that the adapter targets needs factors of its rank;
    factors of modules that it leaves out are not used. lora_alpha, use_rslora, rank_pattern, alpha_pattern and
    fan_in_fan_out are the LoraConfig's: with PEFT's scaling s, A and B are divided by √s, so sBA ≈ W whatever s is.

    factors: a FactorSet, or the path of a factor file.
    form: "delta" leaves the base weights as they are, exact in any dtype and on quantized bases; the
        forward pass subtracts the frozen start, [B, B − B0] [A − A0; A0] x. "residual" puts R = W − sBA into the base
        weights, as PEFT's PiSSA does, and leaves PEFT's forward pass alone.
    overwrite: start an adapter again although it already holds something trained or loaded.

    The config in `peft_model.peft_config` then records that the adapter started from factors: an adapter added with it,
    as TRL's trainers add their reference, starts from the same ones. `save_pretrained` writes the plain LoRA
    of rank 2r, [B, B − B0] [A − A0; A0], which belongs to the original base in both forms, and `load_adapter` resumes
    from it.

    Returns the model. Raises TargetError (no such module, no factors for a module, a shape differs, the model reads a
    module's weight instead of calling it, a quantized module passes no gradients), OptionError (no such adapter, rank
    differs, an adapter that holds something already or is merged, DoRA or another variant, biases, embeddings, the
    residual form of experts, an initialization that has changed the base, a base loaded from a residual folder, the
    delta form where Unsloth's or Axolotl's kernels bypass PEFT's forward) and WeightError (residual form of a
    quantized, sharded, offloaded or shared weight); nothing is changed then.

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
    require_choice("form", form, FORMS)
    config = _config(peft_model, adapter_name)
    if form == "delta":
        _require_forward_of_peft(peft_model)
    require_original(peft_model.get_base_model())
    layers = _lora_layers(peft_model, adapter_name)
    starts = _matched(peft_model, layers, factor_set(factors))
    if form == "residual" and config.target_parameters:
        raise OptionError(
            "the residual form of experts would round R = W − sBA in every one of them, and saves nothing: PEFT adds "
            'their update to the parameter in either form; use form="delta"'
        )
    if form == "residual":
        warn_of_dropout(config.lora_dropout)
    users = users_of_weights(peft_model.get_base_model())
    scaled = {}
    for name, start in starts.items():
        _require_plain_lora(layers[name], name, start, adapter_name)
        if not overwrite and config.init_lora_weights is not False:
            _require_unused(layers[name], name, adapter_name)
        if form == "residual":
            _require_untouched(layers[name], name, users)
        scaled[name] = start.scaled(layers[name].scaling[adapter_name])
    require_called(peft_model.get_base_model(), _linear(layers, starts))
    require_peft_reads_back(peft_model.get_base_model(), config)
    _start(peft_model, layers, scaled, form, adapter_name)
    return peft_model


@trainable_tensors()
def load_delta(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load what `export_delta` wrote, ready to train: a PeftModel whose output is still that of `model`.

    folder: the one with `adapter` in it, or an adapter's own that a started model or a trainer has saved since: then
        the model returned is the trained one, to the rounding of A − A0 and B − B0, still ready to train.

    Raises FactorFileError (a folder of another kind, of A and B alone, say), and what peft and `initialize_peft` raise.
    """
    folder = adapter_path(folder)
    require_original(model)
    require_no_adapters(model)
    if is_there(folder / "initial"):
        raise FactorFileError(f"{folder}: a delta export of an earlier version, of two adapters; export it again")
    at = folder / "adapter" if is_there(folder / "adapter") else folder
    require_unpacked(model, stored := read_adapter(at).factors)
    config = LoraConfig.from_pretrained(str(at))
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if rank % 2:
            raise FactorFileError(f"{at}: this adapter has rank {rank}, which is not twice that of a start; {_GIVE}")
    config = halved(config)
    named = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision")}
    config.base_model_name_or_path = None  # get_peft_model warns where the model was loaded from elsewhere
    peft_model = get_peft_model(model, config, adapter_name)
    assert isinstance(peft_model, PeftModel)
    vars(config).update(named)
    layers = _lora_layers(peft_model, adapter_name)
    paths = {module: path for path, module in peft_model.get_base_model().named_modules()}
    strange = sorted(stored.keys() ^ {paths[layer] for layer in layers.values()})
    if strange:
        raise TargetError(
            f"{folder}: {some(strange, most=1)} of its modules are not linear layers of "
            f"{type(model).__name__} under this name; load the class of model that the export was made for "
            f"(its --task-type)"
        )
    doubled = {}
    for name, layer in layers.items():
        _require_supported(layer, name, adapter_name)
        A, B = stored[paths[layer]]
        doubled[name] = stacks(A, B, layer.num_experts) if isinstance(layer, ParamWrapper) else (A, B)
    _require_difference(doubled, at)
    scaled = {name: start_of(A, B) for name, (A, B) in doubled.items()}
    require_called(peft_model.get_base_model(), _linear(layers, scaled))
    _start(peft_model, layers, scaled, "delta", adapter_name)
    peft_model.load_adapter(str(at), adapter_name, is_trainable=True)
    return peft_model


def _require_difference(stored: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """Raise FactorFileError unless an adapter is [A − A0; A0] and [B, B − B0], and A has moved less than its length.

    The halves of A alone, or of any other LoRA's A, are of one length. A stack of experts has halves in each of them.
    """
    moved = length = 0.0
    for A, _ in stored.values():
        difference, start = A.double().chunk(2, dim=-2)
        moved, length = moved + float(difference.norm()) ** 2, length + float(start.norm()) ** 2
    if not moved < length / 2:
        raise FactorFileError(
            f"{folder}: this adapter does not hold where it started: its A is not [A − A0; A0], as the delta export "
            f"and started models save it; {_GIVE}. With the factors, an adapter of A and B alone goes on by "
            f"initialize_peft, then load_adapter"
        )


@trainable_tensors()
def load_residual(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load the adapter of what `export_residual` wrote, ready to train, so that the model is the original without it.

    `PeftModel.from_pretrained` loads it just as well, but shows R where the adapter is switched off, as trainers do for
    a reference, deleted or scaled. Here the original's output stands in its place, to R's rounding, and
    `save_pretrained` writes the plain LoRA of rank 2r for the original model, as after `initialize_peft`.

    model: loaded from `folder`/base.
    folder: the one with `base` and `adapter` in it. What a trainer has saved of it is loaded afterwards, by
        `peft_model.load_adapter(trained, adapter_name, is_trainable=True)`.

    Raises OptionError (a model from another folder, an adapter that was trained since the export), TargetError, and
    what peft raises for an invalid folder.
    """
    folder = Path(folder)
    record = require_residual(model, folder / "base")
    if record.adapter_sha256 not in (None, sha256_of_file(folder / "adapter" / WEIGHTS)):
        raise OptionError(
            f"{folder / 'adapter'}: it is not the adapter that was exported with this base, so where it started is not "
            f"known; export again, and load the trained one by peft_model.load_adapter"
        )
    peft_model = PeftModel.from_pretrained(model, str(folder / "adapter"), adapter_name, is_trainable=True)
    layers = _lora_layers(peft_model, adapter_name)
    for name, layer in layers.items():
        _require_supported(layer, name, adapter_name)
    for layer in layers.values():
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        start_on_residual(layer, adapter_name, A.detach().clone(), B.detach().clone())
    config = started_config(_config(peft_model, adapter_name), adapter_name, "residual")
    for key, value in named_base(Path(record.base)).items():
        setattr(config, key, value)
    peft_model.peft_config[adapter_name] = config
    save_and_combine_what_was_learned(peft_model)
    return peft_model


def _start(
    peft_model: PeftModel,
    layers: Mapping[str, Layer],
    scaled: Mapping[str, tuple[Tensor, Tensor]],
    form: Form,
    adapter_name: str,
) -> None:
    """Start every layer, each checked first on random input; undo everything if the model's output changes.

    Only a layer itself can say whether its forward pass is one that a start leaves unchanged: PEFT has a class for each
    kind of base, and users register others.
    """
    for name in _linear(layers, scaled):
        require_layer_unchanged(layers[name], name, *scaled[name], form, adapter_name)
    base = peft_model.get_base_model()
    alone = form == "delta" and peft_model.active_adapters == [adapter_name]
    inputs = random_inputs(base) if alone else None
    before = None
    if inputs is not None:
        with disabled(layers.values()):
            before = output_of(peft_model, inputs)
    kept = {name: parts_of(layers[name], adapter_name) for name in scaled} if before is not None else {}
    for name, (A, B) in scaled.items():
        if isinstance(layers[name], ParamWrapper):
            start_experts(layers[name], adapter_name, A, B, name)
        else:
            start_layer(layers[name], adapter_name, A, B, form, name)
    if inputs is not None and before is not None:
        try:
            require_same_output(before, output_of(peft_model, inputs), type(base).__name__)
        except TargetError:
            for name, parts in kept.items():
                put_back(layers[name], adapter_name, parts)
            raise
    peft_model.peft_config[adapter_name] = started_config(_config(peft_model, adapter_name), adapter_name, form)
    save_and_combine_what_was_learned(peft_model)


def _config(peft_model: PeftModel, adapter_name: str) -> LoraConfig:
    """The adapter's config, after checking that what it asks for can start from factors and be converted later."""
    if not isinstance(peft_model, PeftModel):
        raise OptionError(
            f"{type(peft_model).__name__} is no PeftModel; give what get_peft_model returns, without mixed=True: its "
            f"save_pretrained is where the start is taken away again"
        )
    configs = peft_model.peft_config
    if adapter_name not in configs:
        there = ", ".join(configs) or "none; call get_peft_model first"
        raise OptionError(f"no adapter {adapter_name!r} in this model; there is {there}")
    config = configs[adapter_name]
    if not isinstance(config, LoraConfig):
        raise OptionError(f"adapter {adapter_name!r} is a {type(config).__name__}; factors start a LoRA (LoraConfig)")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise OptionError(
            f"init_lora_weights={config.init_lora_weights!r} has set up this adapter already; "
            f"make the LoraConfig with init_lora_weights=True"
        )
    if config.layer_replication:
        raise OptionError(
            f"layer_replication={config.layer_replication}: names do not tell which factors PEFT's copies of layers "
            f"start from; repeat them in a model of its own, and factorize that"
        )
    if config.bias != "none":
        raise OptionError(
            f"bias={config.bias!r} trains biases of the base, which no LoRA for the original model can hold; "
            f'make the LoraConfig with bias="none"'
        )
    return config


def _lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, Layer]:
    """The layers with this adapter, also embeddings, by their name in the base model; experts by the parameter's."""
    return {
        name_of(module, name): module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }


def _matched(peft_model: PeftModel, layers: Mapping[str, Layer], factors: FactorSet) -> dict[str, Start]:
    """The start of each layer. Names are looked up among all linear layers: the adapter may have only some of them."""
    base = peft_model.get_base_model()
    inside = {id(part) for layer in layers.values() for part in layer.modules() if part is not layer}
    shapes: dict[str, tuple[int, ...]] = {
        name: shape
        for name, module in base.named_modules()
        if name and id(module) not in inside and (shape := linear_shape(getattr(module, "base_layer", module)))
    }
    fits, every, where = partial(has_weight_of, base, factors), shapes | expert_shapes(base), type(base).__name__
    starts = find_starts(every, factors, where, model_config(base), fits=fits, model=base)
    starts = with_shared(starts, base, shapes)
    without = [name for name in layers if name not in starts]
    if without:
        instead = "; name the modules that were factorized, or factorize these too"
        if isinstance(layers[without[0]], ParamWrapper):
            instead = (
                ", parameters of experts, into which PEFT turns the names of layers that they have too; leave gate, "
                "gate_proj, up_proj and down_proj out of the factors, or use `attach` and `inilora merge`"
            )
        raise TargetError(f"target_modules selects {some(without, most=1)} that have no factors{instead}")
    return {name: start for name, start in starts.items() if name in layers}


def _linear(layers: Mapping[str, Layer], names: Iterable[str]) -> list[str]:
    """The layers among these that are linear, not parameters of experts."""
    return [name for name in names if not isinstance(layers[name], ParamWrapper)]


def _require_plain_lora(layer: Layer, name: str, start: Start, adapter_name: str) -> None:
    _require_supported(layer, name, adapter_name)
    rank = layer.r[adapter_name]
    if rank != start.rank:
        saved = f". What a model started from factors has saved has twice their rank: it is trained, and {_GO_ON}"
        raise OptionError(
            f"{name}: the LoraConfig sets rank {rank}, the factors ({', '.join(start.names)}) have {start.rank}; "
            f"set r={start.rank}, or rank_pattern for this module alone{saved if rank == 2 * start.rank else ''}"
        )


def _require_supported(layer: Layer, name: str, adapter_name: str) -> None:
    base_layer = layer.get_base_layer()
    lora_A = dict(layer.lora_A.items()).get(adapter_name)
    if isinstance(layer, ParamWrapper):
        require_expert_parameter(layer, name)
    elif linear_shape(base_layer) is None:
        lora_A = None
    if not isinstance(lora_A, nn.Linear):
        raise TargetError(
            f"{name}: {type(base_layer).__name__} is not a linear layer, and factors start nothing else but parameters "
            f"of experts (no embedding, no convolution); leave it out of target_modules"
        )
    variant = layer.lora_variant.get(adapter_name)
    if layer.use_dora.get(adapter_name) or (variant is not None and not isinstance(variant, DeltaVariant)):
        raise OptionError(f"{name}: factors start a plain LoRA, not DoRA or another variant; turn that off")
    if layer.lora_bias.get(adapter_name):
        raise OptionError(f"{name}: lora_bias=True trains biases that have no factors; make the LoraConfig without it")
    if layer.merged:
        raise OptionError(f"{name}: adapters are merged into the base weight; call unmerge_adapter() first")
    for part in (lora_A, layer.lora_B[adapter_name]):
        if type(part.weight.data) is not Tensor or tuple(part.weight.shape) != (part.out_features, part.in_features):
            raise WeightError(f"{name}: A and B are sharded already; start the adapter before the model is sharded")


def _require_unused(layer: Layer, name: str, adapter_name: str) -> None:
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(lora_A, StartedA):
        used = not (torch.equal(lora_A.weight, lora_A.initial) and torch.equal(lora_B.weight, lora_B.initial))
    else:
        used = not lora_B.weight.is_meta and bool(lora_B.weight.any())
    if used:
        raise OptionError(
            f"{name}: adapter {adapter_name!r} is not new: its B is not zero, and the factors would overwrite what was "
            f"trained or loaded; {_GO_ON}. overwrite=True starts it again"
        )


def _require_forward_of_peft(model: nn.Module) -> None:
    """Unsloth and Axolotl put functions named apply_lora_qkv, apply_lora_o and so on into the modules they patch."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if getattr(value, "__name__", "").startswith("apply_lora_"):
                raise OptionError(
                    f"{name}.{attribute} is {value.__name__} of {value.__module__}, which reads A and B alone and "
                    f'would add BAx without subtracting B0A0x; use form="residual"'
                )


def _require_untouched(layer: Layer, name: str, users: Mapping[int, Sequence[str]]) -> None:
    instead = 'use form="delta", which leaves the base as it is'
    base_layer = layer.get_base_layer()
    require_own_weight(base_layer, name, instead)
    require_unshared_weight(users, name, base_layer, "the residual form", instead)
    if is_residual(layer):
        raise OptionError(
            f"{name}: the base weight is a residual already, and another adapter belongs to it; load the model again, "
            f'or use form="delta" for several adapters on one base'
        )
