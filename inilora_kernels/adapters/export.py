"""Factors as folders that PEFT, and every trainer that reads PEFT's folders, takes as they are.

export_residual   OUT/base      the model with R = W − BA in place of each target W
                  OUT/adapter   A and B, trainable
export_delta      OUT/adapter   A and B, trainable
                  OUT/initial   A and −B, to stay frozen beside it on the untouched model
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import FactorFileError, OptionError, TargetError, WeightError
from ..factor_set import FactorSet
from ..factors import Factors
from ..model.architecture import HEADS, describe
from ..model.checkpoint import Checkpoint, open_checkpoint
from ..model.fused import row_index
from ..model.names import match_names
from ..storage.atomic import require_new_folder, whole_folder
from .folder import KEY_PREFIX, Adapter, TaskType, copy_model, write_adapter
from .layer import adapters, warn_if_rounded_away
from .modules import Start, find_starts, is_conv1d, module_of

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
RESIDUAL_RECORD = "inilora_residual.json"

# The table of model classes that a task's AutoModel reads; FEATURE_EXTRACTION is the model without a head.
_CLASSES = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}


@dataclass(frozen=True)
class _Plan:
    """All that both exports need, found before anything is written.

    tensors: the checkpoint's tensor of each matrix's module.
    adapter: the trainable one.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, str]
    adapter: Adapter


def export_residual(
    base: str | Path,
    factors: FactorSet,
    out: str | Path,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: TaskType | None = None,
) -> None:
    """Write OUT/base, the model with R = W − BA in place of each target W, and OUT/adapter with A and B.

    `PeftModel.from_pretrained(AutoModel….from_pretrained("OUT/base"), "OUT/adapter", is_trainable=True)` gives the
    output of the original model, to the rounding of R. R is summed in float32 and cast to W's dtype; config, tokenizer
    and all other tensors are copied as they are. Memory holds one tensor at a time.

    base: a Hugging Face model folder; its target weights must be those that the factors were made of.
    lora_alpha: PEFT's; None for a scaling of 1, as in the paper. The scaling is the same for modules of other ranks,
        and A and B are divided by its square root, so that scaling·BA stays what it is.
    use_rslora: the scaling is lora_alpha / √r instead of lora_alpha / r.
    task_type: PEFT's; the model's own class, as config.json has it, if None. It decides on the names of the modules.
        The head of SEQ_CLS, TOKEN_CLS and QUESTION_ANS must be in `base`, and is copied into the adapter.

    Raises FactorFileError (factors of another model), OptionError, TargetError, CheckpointError, OutputError; nothing
    is left behind then. Warns where the dtype of R loses W to rounding.
    """
    out = Path(out)
    plan = _plan(Path(base), factors, out, lora_alpha, use_rslora, lora_dropout, task_type)
    by_tensor: dict[str, dict[str, Factors]] = {}
    for name, part in factors.items():
        by_tensor.setdefault(plan.tensors[module_of(name)], {})[name] = part
    for tensor in by_tensor:
        weight = plan.checkpoint.weights[tensor]
        if weight.is_quantized:
            raise WeightError(
                f"{plan.checkpoint.path}: {tensor} is quantized ({weight.dequantization}); R = W − BA would have to be "
                f"quantized anew, which is another model: use export_delta, or the original model"
            )

    def residual(tensor: str, stored: Tensor) -> Tensor:
        transposed = next(iter(by_tensor[tensor].values())).transposed
        W = stored.T if transposed else stored
        R = W.to(torch.float32, copy=True)
        for part in by_tensor[tensor].values():
            R[row_index(part.rows, len(R))] -= part.product()
        R = R.to(stored.dtype)
        warn_if_rounded_away(W, R, tensor)
        return R.T if transposed else R

    with whole_folder(out) as folder:
        for name in ("base", "adapter"):
            (folder / name).mkdir()
        copy_model(plan.checkpoint, folder / "base", by_tensor, residual)
        record = {
            "base": str(plan.checkpoint.path.resolve()),
            "source_sha256": {name: part.source_sha256 for name, part in factors.items()},
            "factors_sha256": factors_sha256(factors),
        }
        (folder / "base" / RESIDUAL_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_adapter(folder / "adapter", _with_base(plan.adapter, (out / "base").resolve()))


def export_delta(
    base: str | Path,
    factors: FactorSet,
    out: str | Path,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    task_type: TaskType | None = None,
) -> None:
    """Write OUT/adapter with A and B, to train, and OUT/initial with A and −B, to stay frozen beside it.

    Both together add nothing to the original model, which stays as it is and may be quantized. `load_delta` loads them
    so that this holds to the bit; as two active adapters of plain PEFT it holds to float32 rounding.

    base: the model folder that the factors were made of. The other parameters and the errors are `export_residual`'s.
    """
    out = Path(out)
    plan = _plan(Path(base), factors, out, lora_alpha, use_rslora, lora_dropout, task_type)
    trainable = _with_base(plan.adapter, plan.checkpoint.path.resolve())
    negative = {module: (A, -B) for module, (A, B) in trainable.factors.items()}
    with whole_folder(out) as folder:
        for name, factors_of in (("adapter", trainable.factors), ("initial", negative)):
            (folder / name).mkdir()
            write_adapter(folder / name, Adapter(trainable.config, factors_of, trainable.others))


def save_adapter(
    model: nn.Module, out: str | Path, base: str | Path, task_type: TaskType | None = None, lora_dropout: float = 0.0
) -> None:
    """Write what a model with attached adapters has learned as PEFT's adapter folder, as PEFT itself would.

    For training without PEFT: `attach`, train, `save_adapter`, and `convert` makes a plain LoRA of the folder. It
    holds A and B alone, and modules trained whole, such as a head. A sharded model is gathered first: load its
    `adapter_state_dict` into one that is not.

    base: the original model's folder; task_type: PEFT's, for whoever loads the converted adapter.

    Raises TargetError if no adapter is attached, and OutputError.
    """
    layers = dict(adapters(model))
    if not layers:
        raise TargetError(f"{type(model).__name__} has no adapters; call attach(model, factors) before training")
    learned = {
        name: (layer.lora_A.weight.detach().cpu(), layer.lora_B.weight.detach().cpu()) for name, layer in layers.items()
    }
    whole = sorted(
        {
            name.rpartition(".")[0]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.rpartition(".")[0].rpartition(".")[0] not in layers
        }
    )
    others = {
        f"{KEY_PREFIX}{module}.{name}": tensor.detach().cpu().contiguous()
        for module in whole
        for name, tensor in model.get_submodule(module).state_dict().items()
    }
    ranks = {name: A.shape[0] for name, (A, _) in learned.items()}
    config = {
        **lora_config(ranks, next(iter(layers.values())).scaling, False, [name for name, _ in model.named_modules()]),
        "base_model_name_or_path": str(Path(base).resolve()),
        "lora_dropout": lora_dropout,
        "task_type": task_type,
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "modules_to_save": whole or None,
    }
    with whole_folder(Path(out)) as folder:
        write_adapter(folder, Adapter(config, learned, others))


def require_same_base(checkpoint: Checkpoint, factors: FactorSet) -> dict[str, str]:
    """The checkpoint's tensor of each module, after comparing its sha256 with the one that the factors record.

    Raises FactorFileError if the factors were made of other weights, or do not say of which.
    """
    modules = list(dict.fromkeys(module_of(name) for name in factors))
    weights = {name.removesuffix(".weight") for name in checkpoint.weights if name.endswith(".weight")}
    try:
        names = match_names(modules, weights, str(checkpoint.path))
    except TargetError as error:
        raise FactorFileError(f"the factors are not of this model: {error}") from error
    tensors = {module: f"{name}.weight" for module, name in names.items()}
    for name, part in factors.items():
        if not part.source_sha256:
            raise FactorFileError(
                f"{name}: these factors do not record which weight they are of; "
                f"load them with their base: FactorSet.load(folder, base), or --base"
            )
    for name, part in factors.items():
        found = checkpoint.sha256(tensors[module_of(name)])
        if found != part.source_sha256:
            raise FactorFileError(
                f"{checkpoint.path}: {tensors[module_of(name)]} is not the weight that these factors were made of "
                f"(sha256 {found[:12]}… here, {part.source_sha256[:12]}… in the factors); give the base model that "
                f"`inilora approximate` read, in the same dtype, or make factors of this one"
            )
    return tensors


def factors_sha256(factors: FactorSet) -> str:
    """sha256 (hex) of all names, A and B: which factors these are."""
    digest = hashlib.sha256()
    for name, part in sorted(factors.items()):
        digest.update(name.encode())
        for factor in (part.A, part.B):
            digest.update(factor.contiguous().numpy().data)
    return digest.hexdigest()


def lora_config(
    ranks: Mapping[str, int], scaling: float, use_rslora: bool, all_modules: Collection[str]
) -> dict[str, Any]:
    """The part of PEFT's adapter_config.json that says which modules have which rank and the same scaling.

    r is the most common rank; modules of another one are in rank_pattern and alpha_pattern.

    >>> config = lora_config({"0.q": 4, "0.v": 4, "1.q": 2}, 2.0, False, ["0.q", "0.v", "1.q", "1.k"])
    >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
    (4, 8, {'1.q': 2}, {'1.q': 4})
    >>> config["target_modules"]
    ['q', 'v']
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}

    def alpha(rank: int) -> float:
        value = scaling * (math.sqrt(rank) if use_rslora else rank)
        return int(value) if value == int(value) else value

    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": alpha(common),
        "rank_pattern": others,
        "alpha_pattern": {module: alpha(rank) for module, rank in others.items()},
        "target_modules": _shortest_targets(set(ranks), all_modules),
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _plan(
    base: Path,
    factors: FactorSet,
    out: Path,
    lora_alpha: float | None,
    use_rslora: bool,
    lora_dropout: float,
    task_type: TaskType | None,
) -> _Plan:
    if not 0.0 <= lora_dropout < 1.0:
        raise OptionError(f"lora_dropout={lora_dropout}: it must be at least 0 and below 1")
    if task_type is not None and task_type not in _CLASSES:
        raise OptionError(f"task_type={task_type!r}: it is one of {', '.join(_CLASSES)}")
    require_new_folder(out)
    checkpoint = open_checkpoint(base)
    tensors = require_same_base(checkpoint, factors)
    live_names = _live_names(checkpoint, task_type)
    shapes = {}
    for name, part in factors.items():
        stored = checkpoint.weights[tensors[module_of(name)]].shape
        out_features, in_features = reversed(stored) if part.transposed else stored
        shapes[live_names[tensors[module_of(name)].removesuffix(".weight")]] = (out_features, in_features)
    starts = _starts(shapes, factors, tensors, live_names, checkpoint)
    ranks = {module: start.rank for module, start in starts.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    scaling = 1.0 if lora_alpha is None else lora_alpha / (math.sqrt(common) if use_rslora else common)
    scaled = {module: start.scaled(scaling) for module, start in starts.items()}
    config = {
        **lora_config(ranks, scaling, use_rslora, live_names.values()),
        "lora_dropout": lora_dropout,
        "task_type": task_type,
        "fan_in_fan_out": any(part.transposed for part in factors.values()),
    }
    head = _head(checkpoint) if task_type in HEAD_TASKS else {}
    if head:
        config["modules_to_save"] = sorted({key.removeprefix(KEY_PREFIX).split(".")[0] for key in head})
    return _Plan(checkpoint, tensors, Adapter(config, scaled, head))


def _starts(
    shapes: Mapping[str, tuple[int, int]],
    factors: FactorSet,
    tensors: Mapping[str, str],
    live_names: Mapping[str, str],
    checkpoint: Checkpoint,
) -> dict[str, Start]:
    def renamed(name: str) -> str:
        module, colon, part = name.partition(":")
        return live_names[tensors[module].removesuffix(".weight")] + colon + part

    live = FactorSet({renamed(name): part for name, part in factors.items()}, factors.options)
    return find_starts(shapes, live, str(checkpoint.path))


def _live_names(checkpoint: Checkpoint, task_type: TaskType | None) -> dict[str, str]:
    """The name in the model that the trainer will load of each module with a weight; its own where that is unknown."""
    modules = [name.removesuffix(".weight") for name in checkpoint.weights if name.endswith(".weight")]
    names = {module: module for module in modules}
    if checkpoint.config is None:
        return names
    config = dict(checkpoint.config)
    if task_type is not None:
        table = getattr(transformers.models.auto.modeling_auto, _CLASSES[task_type])
        model_class = table.get(config.get("model_type"))
        if model_class is None:
            raise OptionError(
                f"task_type={task_type}: transformers has no such model for model_type {config.get('model_type')!r}"
            )
        config["architectures"] = [model_class if isinstance(model_class, str) else model_class[0]]
    architecture = describe(config, modules)
    if architecture is None:
        return names
    return names | {module: layer.name for module, layer in architecture.layers.items()}


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


def _shortest_targets(chosen: set[str], all_modules: Collection[str]) -> list[str]:
    """PEFT's target_modules for exactly these: the shortest common endings, or the full names."""
    for parts in (1, 2, 3):
        endings = {".".join(module.split(".")[-parts:]) for module in chosen}
        selected = {
            module
            for module in {*all_modules, *chosen}
            if any(module == ending or module.endswith(f".{ending}") for ending in endings)
        }
        if selected == chosen:
            return sorted(endings)
    return sorted(chosen)


def _with_base(adapter: Adapter, base: Path) -> Adapter:
    return Adapter({**adapter.config, "base_model_name_or_path": str(base)}, adapter.factors, adapter.others)
