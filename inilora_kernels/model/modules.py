"""The modules of a checkpoint that have a weight: what is known about each, and which ones PEFT's syntax selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import TargetError
from .architecture import HEADS, Architecture, Layer, describe
from .checkpoint import Checkpoint
from .formats.weight import StoredWeight
from .names import endings

# What the modules of an unknown architecture are, by the last part of their name.
EMBEDDING = re.compile(r"\w*embeddings?|embed_\w+|wte|wpe|shared|relative_attention_bias")
OUTPUT = re.compile(r"lm_head|embed_out|output_projection|proj_out|output|cls\.predictions\.decoder")
CONV1D = re.compile(r"c_attn|c_proj|c_fc|q_attn")


@dataclass(frozen=True)
class Module:
    """A module of the checkpoint with a weight, and what is known about it.

    entry: its weight.
    layer: what transformers says about it; None if it knows no such module.
    left_out: why it cannot be a target under any target_modules; None if it can.
    """

    path: Path
    name: str
    entry: StoredWeight
    form: Literal["linear", "conv1d", "other"]
    is_inner_linear: bool
    layer: Layer | None
    architecture: Architecture | None
    left_out: str | None

    @property
    def aliases(self) -> set[str]:
        shared = self.layer.shared_with if self.layer is not None and self.shares_with_layers_alone else ()
        return aliases(self.name, self.architecture).union(shared)

    @property
    def shares_with_layers_alone(self) -> bool:
        """Whether all that have its weight too are linear layers, as in Zamba; no embedding, no output layer."""
        return self.layer is None or _shares_with_layers_alone(self.layer, self.architecture)


def _shares_with_layers_alone(layer: Layer, architecture: Architecture | None) -> bool:
    if architecture is None or not layer.shared_with:
        return True
    others = [architecture.model.get_submodule(name) for name in layer.shared_with]
    return architecture.output_names.isdisjoint(layer.shared_with) and all(hasattr(o, "in_features") for o in others)


def aliases(module: str, architecture: Architecture | None) -> set[str]:
    """The names under which PEFT may meet a module of a checkpoint."""
    names = {module}
    if architecture is not None:
        if module in architecture.layers:
            names.add(architecture.layers[module].name)
        elif module in architecture.rearranged:
            names.add(architecture.rearranged[module])
        if architecture.base_model_prefix:
            names |= {f"{architecture.base_model_prefix}.{name}" for name in names}
    return names


_COLON = "a colon in its name, which stands between a weight and its part here; rename it"


def find_modules(checkpoint: Checkpoint) -> list[Module]:
    """Every module of the checkpoint that has a weight; layer 2 comes before layer 10."""
    entries = {
        name.removesuffix(".weight"): weight for name, weight in checkpoint.weights.items() if name.endswith(".weight")
    }
    absent = [name.removesuffix(".weight") for name in checkpoint.absent if name.endswith(".weight")]
    architecture = describe(checkpoint.config, [*entries, *absent]) if checkpoint.config else None
    stored_transposed = _looks_like_gpt2(checkpoint, entries)
    modules = []
    for name in sorted(entries, key=_natural_order):
        layer = architecture.layers.get(name) if architecture else None
        if layer is not None:
            form = layer.form
            inner = form != "other" and not layer.is_output and _shares_with_layers_alone(layer, architecture)
        else:
            form = _form_by_name(name, entries[name], stored_transposed)
            # A tensor without a place in a complete model is a leftover, such as a pretraining head.
            inner = form != "other" and not is_output_by_name(name) and not (architecture and architecture.complete)
        modules.append(
            Module(
                path=checkpoint.path,
                name=name,
                entry=entries[name],
                form=form,
                is_inner_linear=inner,
                layer=layer,
                architecture=architecture,
                left_out=_COLON if ":" in name else architecture.left_out(name) if architecture else None,
            )
        )
    return modules


def once_each(modules: Iterable[Module]) -> list[Module]:
    """The modules, of linear layers that share a weight the first."""
    kept: dict[str, Module] = {}
    for module in modules:
        shared = module.layer.shared_with if module.layer is not None and module.form != "other" else ()
        if not any(name in kept and kept[name].form != "other" for name in shared):
            kept[module.layer.name if module.layer else module.name] = module
    return list(kept.values())


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _looks_like_gpt2(checkpoint: Checkpoint, modules: Iterable[str]) -> bool:
    """Whether modules with Conv1D's names are stored as (in, out), by the length of a bias, out_features."""
    for module in modules:
        weight, bias = checkpoint.tensors.get(f"{module}.weight"), checkpoint.tensors.get(f"{module}.bias")
        if CONV1D.fullmatch(last_part(module)) and weight and bias and len(weight.shape) == 2:
            rows, columns = weight.shape
            if rows != columns and bias.shape == (columns,):
                return True
    return False


def _form_by_name(name: str, entry: StoredWeight, stored_transposed: bool) -> Literal["linear", "conv1d", "other"]:
    if EMBEDDING.fullmatch(last_part(name)) or (not entry.refusal and len(entry.shape) != 2):
        return "other"
    return "conv1d" if stored_transposed and CONV1D.fullmatch(last_part(name)) else "linear"


def is_output_by_name(name: str) -> bool:
    return bool(OUTPUT.fullmatch(name) or OUTPUT.fullmatch(last_part(name))) or name.split(".")[0] in HEADS


def selector(target_modules: Collection[str] | str) -> Callable[[Collection[str]], bool]:
    """A function that says whether `target_modules` selects a module, given all its names. Raises TargetError."""
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(
                f"target_modules={target_modules!r} is not a valid regular expression ({error}); "
                f'for module names give a list: ["query", "value"]'
            ) from error
        return lambda aliases: any(pattern.fullmatch(name) for name in aliases)
    if not all(isinstance(ending, str) and ending for ending in target_modules):
        raise TargetError(f"target_modules={target_modules!r}: every entry must be a module name")
    wanted = frozenset(target_modules)
    return lambda aliases: any(end in wanted for name in aliases for end in endings(name))


def unused(target_modules: Collection[str] | str, modules: Iterable[Module]) -> list[str]:
    """The names in `target_modules`, or the one expression, that select none of these modules."""
    if isinstance(target_modules, str):
        selects = selector(target_modules)
        return [] if any(selects(module.aliases) for module in modules) else [target_modules]
    ends = {end for module in modules for name in module.aliases for end in endings(name)}
    return [name for name in target_modules if name not in ends]


def last_part(name: str) -> str:
    return name.rpartition(".")[2]
