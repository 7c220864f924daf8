"""Names in errors and warnings: a few of many, and the valid name nearest to one that is not."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from .errors import OptionError


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are; "" for none.

    >>> some(["query", "key", "value", "dense"]), some(["query"], most=1)
    ('query, key, value and 1 more', 'query')
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(given: object, known: Collection[str]) -> str:
    """'; did you mean "query"?' if a known name is near enough to be a slip, otherwise nothing.

    >>> did_you_mean("qurey", ["query", "key", "value"])
    '; did you mean "query"?'
    >>> did_you_mean("conv", ["query", "key", "value"])
    ''
    """
    near = nearest(given, known)
    return "" if near is None else f'; did you mean "{near}"?'


def nearest(given: object, known: Collection[str]) -> str | None:
    """The known name that is nearest, if it is near enough to be a slip."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), by_lower_case, n=1, cutoff=0.7)
    return by_lower_case[near[0]] if near else None


def did_you_mean_names(given: Collection[str] | str | None, known: Collection[str]) -> str:
    r"""The same for several names, or for a string that was read as a regular expression but is a list of names.

    >>> did_you_mean_names("query,value", ["query", "value"])
    "; did you mean the list ['query', 'value']?"
    >>> did_you_mean_names(r".*\.qurey", ["query", "value"])
    '; did you mean "query"?'
    """
    names = re.findall(r"[\w.-]*\w", given) if isinstance(given, str) else list(given or ())
    if isinstance(given, str) and names and all(name in known for name in names):
        return f"; did you mean the list {names}?"
    if len(names) == 1 and names[0] in known:
        return f'; did you mean "{names[0]}" itself, not a list?'
    return next((near for name in names if (near := did_you_mean(name, known))), "")


def near_names(path: Path, suffixes: tuple[str, ...]) -> str:
    """'; did you mean "model"?' if next to the first part of a path that is missing something has nearly its name.

    suffixes: of the files that may be meant; folders always may.
    """
    if "~" in path.parts:
        home = Path(os.path.expanduser(Path(*path.parts[path.parts.index("~") :])))
        return f'; did you mean "{home}"?' if os.path.exists(home) else ""
    for part in [*reversed(path.parents), path]:
        if not os.path.lexists(part):
            try:
                with os.scandir(part.parent) as found:
                    names = [one.name for one in found if one.is_dir() or one.name.endswith(suffixes)]
            except OSError:
                return ""
            stems = {Path(name).stem: name for name in names}
            near = nearest(part.stem, stems)
            return "" if near is None else f'; did you mean "{stems[near]}"?'
    return ""


def require_choice(name: str, value: object, choices: Collection[str], more: str = "") -> None:
    """Raise OptionError unless value is one of the choices.

    >>> require_choice("gauge", "nearst", ("nearest", "svd"))
    Traceback (most recent call last):
    inilora_kernels.errors.OptionError: gauge='nearst': choose one of nearest, svd; did you mean "nearest"?
    """
    if value not in choices:
        chosen = f"choose one of {', '.join(filter(None, choices))} {more}".rstrip()
        raise OptionError(f"{name}={value!r}: {chosen}{did_you_mean(value, choices)}")
