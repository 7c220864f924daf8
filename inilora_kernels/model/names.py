"""The same modules' names in a checkpoint, in a model and in a factor set, which may differ by a prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from ..errors import TargetError
from ..suggestions import some

# As PEFT and, in small letters, llama.cpp name an adapter's parts.
_ADAPTER = re.compile(r"\.(base_layer|lora_[ABab])(\.|$)")


def adapter_among(names: Iterable[str]) -> str | None:
    """The first name among a model's tensors that is of an adapter; a layer's own comes before its A and B.

    >>> adapter_among(["0.q_proj.lora_A.weight", "0.q_proj.base_layer.weight"])
    '0.q_proj.base_layer.weight'
    """
    found = [name for name in names if _ADAPTER.search(name)]
    return next((name for name in found if ".base_layer." in name), found[0] if found else None)


def match_names(wanted: Sequence[str], available: Collection[str], where: str) -> dict[str, str]:
    """Return each wanted name's counterpart in `available`: itself, or with one prefix added to or removed from all.

    Takes time proportional to the number of names, not to its square: a mixture of experts has 40,000.

    Raises TargetError if there is no such prefix, or more than one.

    >>> match_names(["encoder.query"], {"bert.encoder.query", "classifier"}, "model")
    {'encoder.query': 'bert.encoder.query'}
    """
    there = frozenset(available)
    first = wanted[0]
    added = sorted(name.removesuffix(first) for name in there if f".{name}".endswith(f".{first}"))
    removed = [first.removesuffix(end) for end in endings(first) if end != first and end in there]
    mappings = []
    for old, new in [("", prefix) for prefix in added] + [(prefix, "") for prefix in sorted(removed)]:
        if all(name.startswith(old) and new + name.removeprefix(old) in there for name in wanted):
            if old == new:
                return {name: name for name in wanted}
            mappings.append({name: new + name.removeprefix(old) for name in wanted})
    if not mappings:
        raise TargetError(
            f"{where}: no linear module {_missing(wanted, there)}, for which there are factors; there are "
            f"{some(available, most=4) or 'none at all'}. Use the factors of this model"
        )
    if len(mappings) > 1:
        raise TargetError(
            f"{where}: {first} fits {' and '.join(mapping[first] for mapping in mappings[:3])}; "
            f"give the submodel that the factors were computed from"
        )
    return mappings[0]


def shortest_endings(chosen: Collection[str], available: Iterable[str]) -> list[str] | None:
    """Return the shortest endings of one to three parts that select `chosen` among `available` and nothing else.

    None if there are no such endings.

    >>> shortest_endings({"0.attn.q", "1.attn.q"}, ["0.attn.q", "0.attn.k", "1.attn.q", "pooler"])
    ['q']
    >>> shortest_endings({"a.0.attn.q"}, ["a.0.attn.q", "b.0.attn.q"]) is None
    True
    """
    chosen = frozenset(chosen)
    others = frozenset(available) - chosen
    for parts in (1, 2, 3):
        ends = {_last_parts(name, parts) for name in chosen}
        if not any(_last_parts(name, parts) in ends for name in others):
            return sorted(ends)
    return None


def _last_parts(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def endings(name: str) -> Iterator[str]:
    """The name, then what remains of it after each dot.

    >>> list(endings("model.layers.0"))
    ['model.layers.0', 'layers.0', '0']
    """
    while name:
        yield name
        name = name.partition(".")[2]


def _missing(wanted: Sequence[str], there: frozenset[str]) -> str:
    """The first name that no prefix could match, or else the first of all."""
    ends = {end for name in there for end in endings(name)}
    return next((name for name in wanted if name not in ends and not any(e in there for e in endings(name))), wanted[0])
