"""Experts in PEFT's adapter folder: where the two matrices of each parameter are, and in which layout.

One module may hold several parameters of experts, and PEFT wraps one wrapper around the other: the last parameter that
the module has is outermost, `mlp.experts.lora_A`, the one before is `mlp.experts.base_layer.lora_A`. Only that position
says which parameter a key belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import FactorFileError
from ..model.experts import is_selected, parameter_of_expert
from .experts import laid_out, stacks
from .folder import Adapter, pattern_value

Pairs = Mapping[str, tuple[Tensor, Tensor]]


def wrapped(factors: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B as PEFT stores them: stacks of experts (E, r, k), (E, d, r) laid out, under their wrapper's name.

    factors: in the order in which the model's modules have their parameters.

    >>> import torch
    >>> pair = torch.ones(3, 2, 5), torch.ones(3, 4, 2)
    >>> list(wrapped({"experts.gate_up_proj": pair, "experts.down_proj": pair}))
    ['experts.base_layer', 'experts']
    """
    beside: dict[str, list[str]] = {}
    for name, (A, _) in factors.items():
        if A.dim() == 3:
            beside.setdefault(name.rpartition(".")[0], []).append(name)
    stored = {}
    for name, (A, B) in factors.items():
        if A.dim() == 2:
            stored[name] = (A, B)
            continue
        module = name.rpartition(".")[0]
        depth = len(beside[module]) - 1 - beside[module].index(name)
        stored[module + depth * ".base_layer"] = laid_out(A, B)
    return stored


def unwrapped(adapter: Adapter, factors: Iterable[str], where: str) -> Adapter:
    """The adapter with stacks under the names of the parameters in place of what PEFT stores for experts.

    factors: the names in the factor set that the adapter started from, in its order, which is the model's.
    where: names the adapter in messages.

    Raises FactorFileError if the adapter's experts are not the factors'.
    """
    targets = adapter.config.get("target_parameters")
    if not targets:
        return adapter
    parameters = list(dict.fromkeys(name for name in map(parameter_of_expert, factors) if name))
    chosen = [name.split(".")[-2:] for name in parameters if is_selected(name, targets)]
    modules, kinds = {module for module, _ in chosen}, list(dict.fromkeys(kind for _, kind in chosen))
    depths = {name: name.count(".base_layer") for name in adapter.factors}
    outer = {name: name.split(".base_layer")[0] for name, depth in depths.items()}
    of_experts = {name for name in adapter.factors if depths[name] or outer[name].rpartition(".")[2] in modules}
    counts = Counter(outer[name] for name in of_experts)
    if not counts or set(counts.values()) != {len(kinds)}:
        raise FactorFileError(
            f"{where}: it adapts the experts {', '.join(sorted(targets))}, and the factors are of "
            f"{', '.join(kinds) or 'none'}; give the factors that it started from"
        )
    found = {}
    for name, (A, B) in adapter.factors.items():
        if name not in of_experts:
            found[name] = (A, B)
            continue
        parameter = f"{outer[name]}.{kinds[len(kinds) - 1 - depths[name]]}"
        rank = pattern_value(adapter.config.get("rank_pattern") or {}, parameter, adapter.config["r"])
        experts, rest = divmod(A.shape[0], int(rank))
        if rest:
            raise FactorFileError(
                f"{where}: {name} has {A.shape[0]} rows, which is not a multiple of its rank {rank}; save it again"
            )
        found[parameter] = stacks(A, B, experts)
    return Adapter(adapter.config, found, adapter.others)
