"""What an export will write, known and checked before it writes anything: names, starts, PEFT's config, the head."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..choices import TASK_TYPES, TaskType
from ..errors import OptionError, TargetError
from ..factor_set import FactorSet
from ..model.architecture import AUTO_CLASSES, HEADS, Architecture, describe, has_class
from ..model.checkpoint import Checkpoint, open_checkpoint
from ..model.experts import parameter_of_expert
from ..model.names import shortest_endings
from ..model.needed import tensors_read
from ..storage.atomic import require_new_folder
from ..suggestions import require_choice, some
from .base import require_same_base
from .diffusers_folder import is_diffusers, loaded_by_pipeline
from .experts import expert_shapes
from .folder import KEY_PREFIX, Adapter
from .model_copy import size_of_copy
from .modules import Start, find_starts, fused_attention, linear_shape, module_of, without
from .started import difference
from .weights import with_shared

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# Half of what `re` keeps compiled: PEFT compiles other expressions in between.
_MOST_PATTERNS = 256


@dataclass(frozen=True)
class Plan:
    """All that both exports need.

    factors: those of the modules that the model loads.
    tensors: the checkpoint's tensor of each matrix's module.
    adapter: the trainable one.
    architecture: of the model that will be loaded; None where transformers does not know it.
    """

    checkpoint: Checkpoint
    factors: FactorSet
    tensors: Mapping[str, str]
    adapter: Adapter
    architecture: Architecture | None


def plan_export(
    base: str | Path,
    factors: FactorSet,
    out: Path,
    *,
    lora_alpha: float | None,
    use_rslora: bool,
    lora_dropout: float,
    task_type: TaskType | None,
    changes_weights: bool,
) -> Plan:
    """Return what to write, or raise what `export_residual` says.

    changes_weights: whether W itself will be replaced, so that it may belong to one module alone. If not, the adapter
        is the LoRA of twice the rank that adds nothing to W.
    """
    if not 0.0 <= lora_dropout < 1.0:
        raise OptionError(f"lora_dropout={lora_dropout}: it must be at least 0 and below 1")
    if task_type is not None:
        require_choice("task_type", task_type, TASK_TYPES)
    require_new_folder(out)
    if changes_weights and (expert := next((name for name in factors if parameter_of_expert(name)), None)):
        raise OptionError(
            f"{expert}: the residual form of experts would round R = W − sBA in every one of them, and saves nothing: "
            f"PEFT adds their update to the parameter in either form; use export_delta (--form delta)"
        )
    heads = HEADS if task_type in HEAD_TASKS else ()
    needed = tensors_read(factors, str(base), heads)
    checkpoint = open_checkpoint(base, choose=None if changes_weights else needed)
    if checkpoint.wrapper and checkpoint.config:
        raise TargetError(
            f"{checkpoint.path}: every name begins with {checkpoint.wrapper}, as DistributedDataParallel or "
            f"torch.compile leave it, so transformers would load none of these weights; save the model itself by its "
            f"save_pretrained, and export with that (the factors fit), or give lora_model the model in memory"
        )
    adapters = 2 * sum(part.A.nbytes + part.B.nbytes for part in factors.values())
    require_new_folder(out, adapters + (size_of_copy(checkpoint) if changes_weights else 0))
    tensors = require_same_base(checkpoint, factors)
    architecture = _architecture(checkpoint, task_type)
    factors = _loaded(checkpoint, loaded_by_pipeline(checkpoint, factors), tensors, architecture)
    tensors = {module_of(name): tensors[module_of(name)] for name in factors}
    live_names = {
        module: _live_name(checkpoint, tensor.removesuffix(".weight"), architecture, changes_weights)
        for module, tensor in tensors.items()
    }
    starts = _starts(checkpoint, factors, tensors, live_names)
    if architecture:
        starts = with_shared(starts, architecture.model, _linear_layers(architecture))
    ranks = {module: start.rank for module, start in starts.items()}
    scaling = common_scaling(ranks, lora_alpha, use_rslora)
    if is_diffusers(checkpoint) and scaling != 1:
        raise OptionError(
            f"lora_alpha={lora_alpha}: diffusers' training scripts save no alpha, and its loaders take the rank for "
            f"it; leave it out"
        )
    scaled = {module: start.scaled(scaling) for module, start in starts.items()}
    if not changes_weights:
        scaled = {module: difference(A, B, A, B) for module, (A, B) in scaled.items()}
        ranks = {module: 2 * rank for module, rank in ranks.items()}
    available = dict(architecture.model.named_modules()) if architecture else module_names(checkpoint)
    experts = {name for name, start in starts.items() if start.A.dim() == 3}
    if experts and lora_dropout:
        raise OptionError(f"lora_dropout={lora_dropout}: PEFT has no dropout for experts; leave it out")
    all_experts = expert_shapes(architecture.model) if architecture else experts
    config = {
        **lora_config(ranks, scaling, use_rslora, available, experts | set(all_experts)),
        "lora_dropout": lora_dropout,
        "task_type": task_type,
        "fan_in_fan_out": any(part.transposed for name, part in factors.items() if not parameter_of_expert(name)),
        "exclude_modules": _all_but(ranks) if architecture else None,
    }
    if architecture and task_type is None:
        model_class = type(architecture.model)
        config["auto_mapping"] = {
            "base_model_class": model_class.__name__,
            "parent_library": model_class.__module__,
        }
    head = _head(checkpoint) if task_type in HEAD_TASKS else {}
    if head:
        config["modules_to_save"] = sorted({key.removeprefix(KEY_PREFIX).split(".")[0] for key in head})
    return Plan(checkpoint, factors, tensors, Adapter(config, scaled, head), architecture)


def common_scaling(ranks: Mapping[str, int], lora_alpha: float | None, use_rslora: bool) -> float:
    """Return the scaling of all modules: what lora_alpha means at their most common rank, 1 where it is None.

    >>> common_scaling({"0.q": 4, "0.v": 4, "1.q": 2}, 8, False)
    2.0
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    return 1.0 if lora_alpha is None else lora_alpha / (math.sqrt(common) if use_rslora else common)


def lora_config(
    ranks: Mapping[str, int],
    scaling: float,
    use_rslora: bool,
    all_modules: Collection[str],
    all_experts: Collection[str] = (),
) -> dict[str, Any]:
    """Return the part of PEFT's LoraConfig that says which modules have which rank and the same scaling.

    r is the most common rank; modules of another one are in rank_pattern and alpha_pattern. all_experts: the model's
    parameters of experts, which go into target_parameters.

    >>> config = lora_config({"0.q": 4, "0.v": 4, "1.q": 2}, 2.0, False, ["0.q", "0.v", "1.q", "1.k"])
    >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
    (4, 8, {'1.q': 2}, {'1.q': 4})
    >>> config["target_modules"]
    ['q', 'v']
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = _patterns({module: rank for module, rank in ranks.items() if rank != common})

    def alpha(rank: int) -> float:
        value = scaling * (math.sqrt(rank) if use_rslora else rank)
        return int(value) if value == int(value) else value

    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": alpha(common),
        "rank_pattern": others,
        "alpha_pattern": {pattern: alpha(rank) for pattern, rank in others.items()},
        "target_modules": _endings(ranks.keys() - set(all_experts), all_modules),
        "target_parameters": _endings(ranks.keys() & set(all_experts), all_experts) or None,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """rank_pattern for these modules: by name, or where there are many, one expression for all of a rank.

    PEFT tries each key on each module, and `re` keeps 512 of them compiled: beyond that loading takes minutes.

    >>> len(_patterns({f"layers.{number}.q_proj": 2 + number % 3 for number in range(300)}))
    3
    """
    if len(ranks) <= _MOST_PATTERNS:
        return dict(ranks)
    modules: dict[int, list[str]] = {}
    for module, rank in ranks.items():
        modules.setdefault(rank, []).append(module)
    return {"|".join(names): rank for rank, names in modules.items()}


def _endings(chosen: Collection[str], available: Collection[str]) -> list[str]:
    """What PEFT's target_modules or target_parameters says of these: endings, or all names."""
    return (shortest_endings(chosen, available) or sorted(chosen)) if chosen else []


def _architecture(checkpoint: Checkpoint, task_type: TaskType | None) -> Architecture | None:
    """The model that the user's class will be; None where transformers knows no such model."""
    if checkpoint.config is None:
        return None
    auto_class = None if task_type is None else AUTO_CLASSES[task_type]
    model_type = checkpoint.config.get("model_type")
    if auto_class is not None and not has_class(checkpoint.config, auto_class):
        raise OptionError(
            f"task_type={task_type}: transformers has no such model for model_type {model_type!r}; leave task_type out "
            f"to load the class that config.json names"
        )
    architecture = describe(checkpoint.config, module_names(checkpoint), auto_class)
    if architecture is None and auto_class is not None:
        raise OptionError(
            f"{checkpoint.path}: transformers cannot build {auto_class} of model_type {model_type!r}, so the names of "
            f"its modules are not known; leave task_type out, or mend the installation"
        )
    return architecture


def _loaded(
    checkpoint: Checkpoint, factors: FactorSet, tensors: Mapping[str, str], architecture: Architecture | None
) -> FactorSet:
    """The factors without those of modules that the model does not load, such as the vision tower of a text model."""
    if architecture is None or not architecture.layers:
        return factors
    stored = {module: tensor.removesuffix(".weight") for module, tensor in tensors.items()}
    left_out = [name for name in factors if stored[module_of(name)] in architecture.unloaded]
    if not left_out:
        return factors
    model = type(architecture.model).__name__
    return without(
        factors,
        set(left_out),
        f"{checkpoint.path}: left out {some(left_out, most=1)}, which {model} does not load; its own modules get "
        f"adapters, and the rest of the model stays as it is",
        f"{checkpoint.path}: {model} loads none of the modules that have factors ({left_out[0]}, …)",
    )


def _live_name(checkpoint: Checkpoint, module: str, architecture: Architecture | None, changes_weights: bool) -> str:
    """The name of a module in the model that will be loaded, where it is a linear layer with a weight of its own."""
    weight = checkpoint.weights.get(f"{module}.weight")
    if weight is not None and weight.is_fused_attention:
        raise fused_attention(str(checkpoint.path), module)
    if architecture is None or not architecture.layers:
        return module
    prefix = architecture.base_model_prefix
    for parameter in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
        if parameter in architecture.parameter_names:
            return parameter
    layer = architecture.layers.get(module)
    where = f"{checkpoint.path}: {module}"
    model = type(architecture.model).__name__
    if layer is None:
        reason = architecture.left_out(module) or f"{model} splits or permutes it on loading"
        raise TargetError(f"{where} cannot get an adapter: {reason}; make the factors again without it")
    if layer.form == "other":
        raise TargetError(
            f"{where} cannot get an adapter: in {model} it is {layer.type}, no linear layer; make the factors again "
            f"without it"
        )
    if layer.shared_with and changes_weights:
        raise TargetError(
            f"{where}: its weight is also that of {', '.join(layer.shared_with)}, which the residual form would change "
            f'too; use form="delta", or make the factors again without it'
        )
    return layer.name


def _starts(
    checkpoint: Checkpoint, factors: FactorSet, tensors: Mapping[str, str], live_names: Mapping[str, str]
) -> dict[str, Start]:
    def renamed(name: str) -> str:
        module, colon, part = name.partition(":")
        return live_names[module] + colon + part

    shapes: dict[str, tuple[int, ...]] = {}
    counts = Counter(module_of(name) for name in factors)
    for name, part in factors.items():
        if parameter_of_expert(name):
            shapes[live_names[module_of(name)]] = (counts[module_of(name)], part.B.shape[0], part.A.shape[1])
            continue
        stored = checkpoint.weights[tensors[module_of(name)]].shape
        out_features, in_features = reversed(stored) if part.transposed else stored
        shapes[live_names[module_of(name)]] = (out_features, in_features)
    live = FactorSet({renamed(name): part for name, part in factors.items()}, factors.options)
    return find_starts(shapes, live, str(checkpoint.path))


def _linear_layers(architecture: Architecture) -> set[str]:
    return {name for name, module in architecture.model.named_modules() if linear_shape(module)}


def module_names(checkpoint: Checkpoint) -> list[str]:
    """The modules of a checkpoint that have a weight, also those in shards that are not here."""
    names = (*checkpoint.weights, *checkpoint.absent)
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _all_but(modules: Collection[str]) -> str | None:
    """PEFT's exclude_modules that keeps an adapter off a model whose modules have other names than these.

    Loaded onto another class of the same checkpoint, the adapter's keys would match nothing and PEFT would go on with a
    fresh LoRA; with no module left to adapt it raises an error.

    >>> _all_but(["model.layers.0.q_proj", "model.layers.1.q_proj"])
    '(?!model\\\\.layers\\\\.).*'
    """
    roots = set()
    for module in modules:
        parts = module.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        roots.add("".join(f"{re.escape(part)}\\." for part in parts[:number]))
    return f"(?!{'|'.join(sorted(roots))}).*" if all(roots) else None


def _head(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the head, which PEFT trains whole for such a task and wants in the adapter's file."""
    names = [name for name in checkpoint.tensors if name.split(".")[0] in HEADS]
    if not names:
        raise OptionError(
            f"{checkpoint.path}: no head in it for this task ({', '.join(sorted(HEADS))}), and a new one would differ "
            f"from load to load; load the model with its head, save_pretrained it, and export from that folder with "
            f"the same factors"
        )
    return {f"{KEY_PREFIX}{name}": checkpoint.read(name) for name in names}
