"""Names in errors and warnings: a few of many, and the valid name nearest to one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


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
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), by_lower_case, n=1, cutoff=0.7)
    return f'; did you mean "{by_lower_case[near[0]]}"?' if near else ""


def did_you_mean_names(given: Collection[str] | str | None, known: Collection[str]) -> str:
    """The same for several names, or for a string that was read as a regular expression but is a list of names.

    >>> did_you_mean_names("query,value", ["query", "value"])
    "; did you mean the list ['query', 'value']?"
    """
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given or ())
    if isinstance(given, str) and all(name in known for name in names):
        return f"; did you mean the list {names}?"
    return next((near for name in names if (near := did_you_mean(name, known))), "")
