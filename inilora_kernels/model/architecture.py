"""What transformers knows of a checkpoint's modules: which are linear, which way round, and their live names.

The architecture that config.json names is built on the meta device: no weights, no network, no code from the
model's folder. Names in a file and names in the model differ in two ways: a checkpoint of a base model lacks
the prefix that a model with a head has (`bert.`), and transformers 5 has renamed modules since the files were
written (ViT's `attention.attention.query` is `attention.q_proj` there).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Heads on top of the body, where the class gives no `get_output_embeddings`. PEFT trains them whole.
HEADS = frozenset({"classifier", "score", "qa_outputs"})


@dataclass(frozen=True)
class Layer:
    """One module of the model that has a weight.

    name: its name in the model that transformers builds.
    type: its class's name.
    form: "linear" stores W as (out_features, in_features), "conv1d" as (in_features, out_features); "other"
        is no linear layer.
    shape: of the weight as stored.
    is_output: the output embedding, or a head on top.
    shared_with: other modules that use the same parameter.
    """

    name: str
    type: str
    form: Literal["linear", "conv1d", "other"]
    shape: tuple[int, ...]
    is_output: bool
    shared_with: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """The modules of one model.

    layers: by the module's name in the checkpoint; only those that the model has.
    complete: every linear layer of the model is in the checkpoint, so what else is there is not the model's.
    base_model_prefix: what a model with a head puts before the base model's names.
    config: transformers' own, with its defaults filled in.
    """

    layers: Mapping[str, Layer]
    complete: bool
    base_model_prefix: str
    config: Any


def describe(config: Mapping[str, Any], modules: Iterable[str]) -> Architecture | None:
    """What the architecture named by a config.json says of these modules of a checkpoint.

    None where transformers does not know the architecture or cannot build it.
    """
    model = _build(config)
    if model is None:
        return None
    layers = _layers(model)
    live_names = loaded_names(model, modules)
    found = {name: layers[live] for name, live in live_names.items() if live in layers}
    needed = {name for name, layer in layers.items() if layer.form != "other" and not layer.shared_with}
    return Architecture(
        layers=found,
        complete=needed <= {layer.name for layer in found.values()},
        base_model_prefix=model.base_model_prefix,
        config=model.config,
    )


def loaded_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """The name in a live model of each module of a checkpoint, for those that the model has.

    As `from_pretrained` does: with the base model's prefix added or taken away, and through transformers' own
    table of renamed modules.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> loaded_names(BertModel(config), ["bert.pooler.dense", "cls.predictions.decoder"])
    {'bert.pooler.dense': 'pooler.dense'}
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".weight")}
    prefix = f"{model.base_model_prefix}."
    rename = _renaming(model)
    names: dict[str, str] = {}
    for module in modules:
        tensor = f"{module}.weight"
        renamed = rename(tensor)
        for candidate in (tensor, renamed):
            for name in (candidate, prefix + candidate, candidate.removeprefix(prefix)):
                if name in weights:
                    names.setdefault(module, name.removesuffix(".weight"))
    return names


def _renaming(model: PreTrainedModel) -> Any:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4: the model's modules are named as its files are
        return lambda name: name
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def rename(name: str) -> str:
        renamed, converter = rename_source_key(name, renamings, converters)
        # A converter merges or splits tensors, so what comes out is another matrix than this one.
        return name if converter is not None else str(renamed)

    return rename


def _layers(model: PreTrainedModel) -> dict[str, Layer]:
    from transformers.pytorch_utils import Conv1D

    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for names in users.values():
        for name in names:
            module = modules[name]
            layers[name] = Layer(
                name=name,
                type=type(module).__name__,
                form=(
                    "linear"
                    if isinstance(module, torch.nn.Linear)
                    else "conv1d"
                    if isinstance(module, Conv1D)
                    else "other"
                ),
                shape=tuple(module.weight.shape),
                is_output=module is output or name.split(".")[0] in HEADS,
                shared_with=tuple(other for other in names if other != name),
            )
    return layers


def _build(config: Mapping[str, Any]) -> PreTrainedModel | None:
    import transformers

    # The attention kernel does not matter here, and the one asked for may not be installed.
    plain = {key: value for key, value in config.items() if "attn_implementation" not in key}
    model_class = getattr(transformers, str((config.get("architectures") or [None])[0]), None)
    try:
        if config.get("model_type") in transformers.CONFIG_MAPPING:
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)
        elif model_class is not None:
            settings = model_class.config_class.from_dict(plain)
        else:
            return None
        with torch.device("meta"):
            build: Any = model_class or transformers.AutoModel.from_config
            model = build(settings)
            model.get_output_embeddings()
            return model  # type: ignore[no-any-return]
    except Exception:
        # A config may be anything, and a model class may raise anything on it or want a package not here.
        return None
