"""Module names as a table or a figure shows them: what all share, each one's kind, and the layer it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# A kind's name with more parts than this is shown by its first and its last.
_MOST_PARTS = 3


@dataclass(frozen=True)
class Place:
    """Where a module is. kind: its name without the numbers, shortened; layer: the first number that varies."""

    kind: str
    layer: int


def places_of(names: Sequence[str]) -> list[Place]:
    """Each module's kind and layer.

    >>> [(place.kind, place.layer) for place in places_of(["h.0.attn.q", "h.0.mlp.fc", "h.1.attn.q", "h.1.mlp.fc"])]
    [('q', 0), ('fc', 0), ('q', 1), ('fc', 1)]
    """
    rows = [printable(name).replace(":", ".").split(".") for name in names]
    varying = _varying_numbers(rows)
    patterns = [
        tuple("*" if (tuple(row[:place]), place) in varying else part for place, part in enumerate(row)) for row in rows
    ]
    # Numbers within numbers: a layer's experts share the layer's pattern only once both numbers are starred.
    patterns = [_starred(row, pattern) for row, pattern in zip(rows, patterns, strict=True)]
    kinds = _shortest_endings(list(dict.fromkeys(patterns)))
    return [
        Place(kinds[pattern], next((int(part) for part, star in zip(row, pattern, strict=True) if star == "*"), 0))
        for row, pattern in zip(rows, patterns, strict=True)
    ]


def printable(text: str) -> str:
    r"""The text with what a terminal would obey, or turn around, spelled out: names come from files.

    >>> print(printable("layer.\x1b[31mred.query"))
    layer.\x1b[31mred.query
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def labels_of(names: Sequence[str]) -> tuple[list[str], str]:
    """What distinguishes each name from the others, and the pattern they share.

    >>> labels_of(["layer.0.self.query", "layer.1.self.query"])
    (['0', '1'], 'layer.*.self.query')
    """
    names = [printable(name) for name in names]
    rows = [name.split(".") for name in names]
    if len(names) == 1 or len({len(row) for row in rows}) > 1:
        return list(names), "*"
    differs = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
    labels = [".".join(part for part, own in zip(row, differs, strict=True) if own) for row in rows]
    pattern = ".".join("*" if own else part for part, own in zip(rows[0], differs, strict=True))
    return labels, pattern


def _varying_numbers(rows: Sequence[Sequence[str]]) -> set[tuple[tuple[str, ...], int]]:
    """(parts before it, position) of each number that takes more than one value there."""
    seen: dict[tuple[tuple[str, ...], int], set[str]] = {}
    for row in rows:
        for place, part in enumerate(row):
            if part.isdecimal():
                seen.setdefault((tuple(row[:place]), place), set()).add(part)
    return {where for where, values in seen.items() if len(values) > 1}


def _starred(row: Sequence[str], pattern: Sequence[str]) -> tuple[str, ...]:
    """The pattern with every number after its first star starred too."""
    first = pattern.index("*") if "*" in pattern else len(pattern)
    return tuple("*" if place > first and row[place].isdecimal() else part for place, part in enumerate(pattern))


def _shortest_endings(patterns: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For each pattern, the fewest of its last parts that no other pattern ends in, without leading stars."""
    endings = {}
    users = Counter(pattern[-count:] for pattern in patterns for count in range(1, len(pattern) + 1))
    for pattern in patterns:
        count = 1
        while count < len(pattern) and users[pattern[-count:]] > 1:
            count += 1
        parts = [part for part in pattern[-count:] if part != "*"]
        endings[pattern] = f"{parts[0]}…{parts[-1]}" if len(parts) > _MOST_PARTS else ".".join(parts) or "matrix"
    if len(set(endings.values())) < len(endings):
        return {pattern: ".".join(pattern) for pattern in patterns}
    return endings
