"""Names of the same modules in a checkpoint, in a model and in a factor set: they differ by a prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..errors import TargetError


def match_names(wanted: Sequence[str], available: Collection[str], where: str) -> dict[str, str]:
    """The name among `available` of each wanted name: itself, or with one prefix for all added or taken away.

    Raises TargetError if there is no such prefix, or more than one.

    >>> match_names(["encoder.query"], {"bert.encoder.query", "classifier"}, "model")
    {'encoder.query': 'bert.encoder.query'}
    """
    first = wanted[0]
    added = sorted(name.removesuffix(first) for name in available if f".{name}".endswith(f".{first}"))
    removed = sorted(first.removesuffix(name) for name in available if first.endswith(f".{name}"))
    prefixes = [("", prefix) for prefix in added] + [(prefix, "") for prefix in removed]
    mappings = []
    for old, new in prefixes:
        mapping = {name: new + name.removeprefix(old) for name in wanted if name.startswith(old)}
        if len(mapping) == len(wanted) and all(name in available for name in mapping.values()):
            if mapping == {name: name for name in wanted}:
                return mapping
            mappings.append(mapping)
    if not mappings:
        missing = next((name for name in wanted if not _has(name, available)), first)
        raise TargetError(
            f"{where}: no linear module {missing}, for which there are factors; there are "
            f"{_some(available)}. Use the factors of this model"
        )
    if len(mappings) > 1:
        raise TargetError(
            f"{where}: {first} fits {' and '.join(mapping[first] for mapping in mappings[:3])}; "
            f"give the submodel that the factors were made of"
        )
    return mappings[0]


def _has(name: str, available: Collection[str]) -> bool:
    return any(f".{other}".endswith(f".{name}") or name.endswith(f".{other}") for other in available)


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    if not names:
        return "none at all"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
