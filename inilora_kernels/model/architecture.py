"""What transformers knows about a checkpoint's modules: which are linear, their orientation, and their live names.

The model that the user's class will load is built on the meta device: no weights, no network, no code from the model's
folder. Names in a file and names in that model differ in several ways: a checkpoint of a base model lacks the prefix
that a model with a head has (`bert.`), the text model of a vision-language checkpoint has other names than the whole,
transformers 5 has renamed modules since the files were written (ViT's `attention.attention.query` is
`attention.q_proj` there) and keeps all experts of a layer in one parameter, and some tensors of a file are not loaded
at all (the layers for multi-token prediction).
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..choices import TaskType
from .aside import aside, modules_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Heads on top of the body, for classes without `get_output_embeddings`. PEFT trains them whole.
HEADS = frozenset({"classifier", "score", "qa_outputs"})

# The class that loads models for each of PEFT's task_types.
AUTO_CLASSES: Mapping[TaskType, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class Layer:
    """One module of the model that has a weight.

    name: its name in the model that transformers builds.
    type: its class's name.
    form: "linear" stores W as (out_features, in_features), "conv1d" as (in_features, out_features); "other"
        is not a linear layer.
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
class Conversion:
    """How transformers makes one parameter of several stored tensors, as seen from one of them.

    operations: what is done with them, in order: "MergeModulelist(0)" stacks, "Concatenate(1)" joins.
    place: of this tensor among those that are joined.
    turns_if_needed: whether all that is done is to transpose the matrices of a stack where it has not the right shape.
    """

    operations: tuple[str, ...]
    place: int
    turns_if_needed: bool = False


@dataclass(frozen=True, eq=False)
class Architecture:
    """The modules of one model.

    model: the model itself, on the meta device.
    layers: by the module's name in the checkpoint; only those that the model loads one to one.
    merged: the parameter that several modules' weights become on loading, such as all experts of a layer.
    rearranged: the module that a weight becomes, or the first of several, where it is split or permuted on loading.
    conversions: how each of the weights of both becomes what it does.
    unloaded: modules of the checkpoint that the model does not load.
    missing: modules of the model that the checkpoint has no weight for.
    complete: every linear layer of the model is in the checkpoint, so anything else there does not belong to the model.
    base_model_prefix: the prefix that a model with a head adds to the base model's names.
    config: transformers' config, with its defaults filled in.
    loads_into: where a tensor of the checkpoint goes: its name in the model, None if nowhere; how, if not as it is.
    """

    model: PreTrainedModel
    layers: Mapping[str, Layer]
    merged: Mapping[str, str]
    rearranged: Mapping[str, str]
    conversions: Mapping[str, Conversion]
    unloaded: frozenset[str]
    missing: tuple[str, ...]
    complete: bool
    base_model_prefix: str
    config: Any
    loads_into: Callable[[str], tuple[str | None, Conversion | None]]

    def live_name(self, tensor: str) -> str | None:
        """The name in the model of a tensor of the checkpoint; None where the model does not load it one to one."""
        live, conversion = self.loads_into(tensor)
        return None if conversion is not None else live

    @functools.cached_property
    def parameter_names(self) -> frozenset[str]:
        """The names of all parameters of the model, shared ones under each of their names."""
        return frozenset(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    @functools.cached_property
    def output_names(self) -> frozenset[str]:
        """The names of the modules that turn the last hidden state into token scores."""
        output = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return frozenset(name for name, module in self.model.named_modules(remove_duplicate=False) if module is output)

    def left_out(self, module: str) -> str | None:
        """Return why a module of the checkpoint is not a layer of the model; None if it is, or if nothing is known."""
        # If no module fits at all, config.json and the names are not about the same model.
        if module in self.layers or not self.layers:
            return None
        name = type(self.model).__name__
        if module in self.merged:
            parameter = re.sub(r"\.\d+\.", ".*.", self.merged[module])
            ending = ".".join(parameter.split(".")[-2:])
            if self.merged[module] in self.parameter_names:
                return f'{name} keeps it as a part of {parameter}, which target_parameters=["{ending}"] factorizes'
            return f"{name} joins it with others to {parameter} on loading; factorize the live model, which has that"
        if module in self.rearranged:
            return f"{name} splits or permutes it on loading, so no adapter fits its factors; factorize the live model"
        return f"{name} does not load it" if module in self.unloaded else None


def describe(config: Mapping[str, Any], modules: Iterable[str], auto_class: str | None = None) -> Architecture | None:
    """Return what transformers says about these modules of a checkpoint.

    config: the checkpoint's config.json.
    auto_class: the class that will load it, such as "AutoModelForCausalLM". None: the one that config.json names, or
        AutoModel if the checkpoint lacks less of that one: all-mpnet-base-v2 names MPNetForMaskedLM and holds the
        bare model. Where config.json names none, the first of `AUTO_CLASSES` that the most of the weights fit.

    Returns None if transformers has no such model, and also, with a warning, if it fails to build it.
    """
    names = list(modules)
    kind = auto_class or str((config.get("architectures") or ["AutoModel"])[0])
    model = _build(config, kind, len(names))
    if model is None:
        return None
    named = _architecture(model, names)
    if auto_class is None and not config.get("architectures"):
        return _best_fit(config, names, named)
    if auto_class is not None or not named.missing:
        return named
    bare_model = _build(config, "AutoModel", len(names))
    if bare_model is None:
        return named
    bare = _architecture(bare_model, names)
    return bare if len(bare.missing) < len(named.missing) else named


def _best_fit(config: Mapping[str, Any], names: list[str], bare: Architecture) -> Architecture:
    """Of the bare model and those with a head, the first that has the fewest weights of its own or of the file left."""
    if not bare.unloaded:
        return bare
    kinds = [kind for kind in dict.fromkeys(AUTO_CLASSES.values()) if kind != "AutoModel" and has_class(config, kind)]
    models = [model for kind in kinds if (model := _build(config, kind, len(names))) is not None]
    described = [bare, *(_architecture(model, names) for model in models)]
    return min(described, key=lambda one: len(one.unloaded) + len(one.missing))


def architectures(config: Mapping[str, Any], modules: Iterable[str]) -> Iterator[Architecture]:
    """Yield what these modules are in each class that may load the checkpoint, the one that config.json names first."""
    names, named = list(modules), config.get("architectures")
    kinds = [kind for kind in dict.fromkeys(AUTO_CLASSES.values()) if has_class(config, kind)]
    for kind in (str(named[0]) if named else None, *kinds):
        architecture = describe(config, names, kind)
        if architecture is not None:
            yield architecture


def has_class(config: Mapping[str, Any], auto_class: str) -> bool:
    """Whether transformers has a model of this kind for the config's model_type."""
    import transformers

    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return False
    return transformers.CONFIG_MAPPING[config["model_type"]] in getattr(transformers, auto_class)._model_mapping


def loaded_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """Return the name in a live model of each module of a checkpoint, for those that it loads one to one.

    As in `from_pretrained`: with the base model's prefix added or removed, and through transformers' own table of
    renamed modules.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> loaded_names(BertModel(config), ["bert.pooler.dense", "cls.predictions.decoder"])
    {'bert.pooler.dense': 'pooler.dense'}
    """
    return names_on_loading(model, modules)[0]


def names_on_loading(model: PreTrainedModel, modules: Iterable[str]) -> tuple[dict[str, str], frozenset[str]]:
    """`loaded_names`, and which modules the live model merges, splits or permutes. It may have PEFT's adapters."""
    loads_into = _loader(model)
    names, converted = {}, set()
    for module in modules:
        live, conversion = loads_into(f"{module}.weight")
        if live is not None and conversion is not None:
            converted.add(module)
        elif live is not None:
            names[module] = live.removesuffix(".weight")
    return names, frozenset(converted)


def _architecture(model: PreTrainedModel, modules: list[str]) -> Architecture:
    every = _layers(model)
    loads_into = _loader(model)
    layers: dict[str, Layer] = {}
    merged: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    unloaded = []
    for module in modules:
        live, conversion = loads_into(f"{module}.weight")
        if live is None:
            # What is called so here may be a parameter there, in_proj_weight of torch's MultiheadAttention.
            live, conversion = loads_into(f"{module}_weight")
        name = None if live is None else live.removesuffix(".weight")
        if name is None:
            unloaded.append(module)
        elif conversion is not None:
            merged[module], conversions[module] = name, conversion
        elif name in every:
            layers[module] = every[name]
    # What comes from one tensor alone was split or permuted: a matrix of its own, but not one of the model's.
    parts = Counter(merged.values())
    sources = {layer.name for layer in layers.values()} | set(merged.values())
    missing = [name for name, layer in every.items() if name not in sources and not layer.shared_with]

    return Architecture(
        model=model,
        layers=layers,
        merged={module: name for module, name in merged.items() if parts[name] > 1},
        rearranged={module: name for module, name in merged.items() if parts[name] == 1},
        conversions=conversions,
        unloaded=frozenset(unloaded),
        missing=tuple(missing),
        complete=all(every[name].form == "other" for name in missing),
        base_model_prefix=model.base_model_prefix,
        config=model.config,
        loads_into=loads_into,
    )


def _loader(model: PreTrainedModel) -> Callable[[str], tuple[str | None, Conversion | None]]:
    """Where a tensor of a checkpoint goes: its name in the model, None if nowhere; how, if not just as it is."""
    prefix: str = model.base_model_prefix
    tensors = {name.replace(".base_layer.", "."): one for name, one in model.state_dict(keep_vars=True).items()}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4: each class has its own patterns, and modules are never merged
        patterns: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def renamed(name: str) -> tuple[str | None, Conversion | None]:
            for pattern, replacement in patterns.items():
                name = re.sub(pattern, replacement, name)
            for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if candidate in tensors:
                    return candidate, None
            return None, None

        return renamed
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def loads_into(name: str) -> tuple[str | None, Conversion | None]:
        live, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
        if live not in tensors and name in tensors:
            live, pattern = rename_source_key(name, [], [], prefix, tensors)
        return (live if live in tensors else None), None if pattern is None else _conversion(pattern, converters)

    return loads_into


def _conversion(pattern: str, converters: Iterable[Any]) -> Conversion:
    converter = next(one for one in converters if pattern in one.source_patterns)
    operations = (f"{type(one).__name__}({getattr(one, 'dim', '')})" for one in converter.operations)
    turns = all(getattr(one, "check_dims", False) and (one.dim0, one.dim1) == (1, 2) for one in converter.operations)
    return Conversion(tuple(operations), list(converter.source_patterns).index(pattern), turns)


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
                form="linear" if _is_linear(module) else "conv1d" if isinstance(module, Conv1D) else "other",
                shape=tuple(module.weight.shape),
                is_output=module is output or name.split(".")[0] in HEADS,
                shared_with=tuple(other for other in names if other != name),
            )
    return layers


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether it is nn.Linear, or a class of it that runs and gives one tensor of that shape: Llama 4's router returns
    its choice too, and DeepSeek-V4's o_a_proj multiplies groups of its input with parts of its weight.
    Not out_proj of torch's MultiheadAttention (SigLIP's head), whose weight is read and which is not called."""
    read = isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
    if read or not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return isinstance(module, torch.nn.Linear) and not read
    x = torch.empty(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        output: Any = module(x)
    except Exception:  # whatever a class raises on input that is not meant for it
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, module.out_features)


def _build(config: Mapping[str, Any], kind: str, weights: int) -> PreTrainedModel | None:
    """The model for a config.json, on the meta device. kind: its class, an auto class or one of transformers' own."""
    import transformers

    # The attention kernel does not matter here, and the requested one may not be installed. Without `auto_map`, no
    # class comes from the model's folder.
    plain = {
        key: _with_infinities(value)
        for key, value in config.items()
        if "attn_implementation" not in key and key != "auto_map"
    }
    try:
        model_class: Any = getattr(transformers, kind, None)
        if config.get("model_type") in transformers.CONFIG_MAPPING:
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)
        elif getattr(model_class, "config_class", None) is not None:
            settings = model_class.config_class.from_dict(plain)
        else:
            return None
        if model_class is None or kind.startswith("Auto"):
            auto_class = getattr(transformers, kind if kind.startswith("Auto") else "AutoModel")
            if type(settings) not in auto_class._model_mapping:
                return None
            build: Any = functools.partial(auto_class.from_config, trust_remote_code=False)
        else:
            # As the auto classes do for the text model of a vision-language config.
            if type(settings) is not model_class.config_class and model_class.config_class in _sub_configs(settings):
                settings = settings.get_text_config()
            build = model_class
        with torch.device("meta"), aside(), modules_for(weights):
            model: PreTrainedModel = build(settings)
        model.get_output_embeddings()  # type: ignore[no-untyped-call]
        model.eval()  # type: ignore[no-untyped-call]
        return model
    except Exception as error:
        # A config may be anything, and a class may raise anything on it, or need a package that is not installed.
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"transformers {transformers.__version__} cannot build {kind} of model_type {config.get('model_type')!r} "
            f"({type(error).__name__}: {reason}), so modules are known by their names in the checkpoint alone; mend "
            f"the installation or config.json, or name the target_modules",
            stacklevel=4,
        )
        return None


def _with_infinities(value: Any) -> Any:
    """JSON has no infinity, so transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(one) for key, one in value.items()}
    return [_with_infinities(one) for one in value] if isinstance(value, list) else value


def _sub_configs(settings: Any) -> list[type]:
    return list(getattr(settings, "sub_configs", {}).values())
