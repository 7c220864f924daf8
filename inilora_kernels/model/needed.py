"""Which tensors of a checkpoint are read for factors that there are already, so that of a model on the hub the shards
without them are not downloaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import FactorFileError, TargetError
from .experts import parameter_of_expert
from .formats.find import module_and_part
from .hub import Choose
from .names import match_names


def tensors_of_modules(weights: Collection[str], modules: Sequence[str], where: str) -> dict[str, str]:
    """The weight of each module, among these names. Raises FactorFileError where the model has no such modules.

    >>> tensors_of_modules(["bert.encoder.query.weight", "bert.embeddings.weight"], ["encoder.query"], "model")
    {'encoder.query': 'bert.encoder.query.weight'}
    """
    there = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    try:
        names = match_names(modules, there, where) if modules else {}
    except TargetError as error:
        raise FactorFileError(f"the factors are not of this model: {error}") from error
    return {module: f"{name}.weight" for module, name in names.items()}


def tensors_read(factors: Collection[str], where: str, besides: Collection[str] = ()) -> Choose:
    """The stored tensors that make up the weights of these factors, by their names; all where some are of experts.

    besides: modules at the top of the model, such as heads, that are read whole.
    """

    def choose(names: Collection[str], config: Mapping[str, Any] | None) -> Collection[str]:
        if any(map(parameter_of_expert, factors)):
            return names
        modules = list(dict.fromkeys(name.partition(":")[0] for name in factors))
        module_of = {name: module_and_part(name, names)[0] for name in names}
        if config is None:  # of a pipeline those models that are in shards; others' names are not here
            models = {name.partition(".")[0] for name in names}
            modules = [name for name in modules if name.partition(".")[0] in models]
        wanted = tensors_of_modules([f"{module}.weight" for module in set(module_of.values())], modules, where)
        chosen = {tensor.removesuffix(".weight") for tensor in wanted.values()}
        return [name for name, module in module_of.items() if module in chosen or name.split(".")[0] in besides]

    return choose
