"""`inilora cache`: the finished matrices that later runs reuse.

The storage is imported when a command runs: it imports torch, and --help does not wait for that.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..display.sentences import BYTES, size_in_words
from ..errors import FactorFileError, OptionError
from ..places import cache_folder
from ..suggestions import some
from .arguments import Json

if TYPE_CHECKING:
    from ..storage.cache_upkeep import Entry

cache_application = typer.Typer(
    name="cache",
    help="Look at, check and remove the finished matrices that runs reuse.",
    no_args_is_help=True,
)

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {"": 1, **BYTES}


@cache_application.command()
def where() -> None:
    """Print the cache's folder, which INILORA_CACHE changes."""
    folder = cache_folder()
    if folder is None:
        raise OptionError("this user has no home folder; set INILORA_CACHE to a folder for the cache")
    print(folder)


@cache_application.command()
def size(as_json: Json = False) -> None:
    """Print how many matrices the cache holds, and their size."""
    from ..storage import cache_upkeep

    _print(cache_upkeep.entries(), "in", as_json)


@cache_application.command("list")
def list_entries(as_json: Json = False) -> None:
    """List the entries, least recently used first: key, size, last use."""
    from ..storage import cache_upkeep

    found = cache_upkeep.entries()
    if as_json:
        print(json.dumps([{"key": one.key, "bytes": one.size, "last_used": one.last_used} for one in found], indent=2))
        return
    for one in found:
        print(
            f"{one.key}  {size_in_words(one.size):>9}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(one.last_used))}"
        )


@cache_application.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(help="Remove entries not used for this long: 30d, 12h, 2w, 90min.")
    ] = None,
    to_size: Annotated[
        str | None, typer.Option(help="Remove the least recently used entries until this much is left: 500MB, 2GB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove old entries."""
    if older_than is None and to_size is None:
        raise OptionError("give --older-than or --to-size; `inilora cache clear` removes everything")
    age = None if older_than is None else _measure("--older-than", older_than, _SECONDS, "30d")
    most = None if to_size is None else int(_measure("--to-size", to_size, _BYTES, "2GB"))
    from ..storage import cache_upkeep

    _print(cache_upkeep.prune(age, most), "removed from", as_json)


@cache_application.command()
def clear(as_json: Json = False) -> None:
    """Remove every entry."""
    from ..storage import cache_upkeep

    doomed = cache_upkeep.entries()
    cache_upkeep.remove(doomed)
    _print(doomed, "removed from", as_json)


@cache_application.command()
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Remove the damaged ones.")] = False, as_json: Json = False
) -> None:
    """Check every entry's checksum; exit with status 2 if one is damaged. Runs never use such an entry."""
    from ..storage import cache_upkeep

    damaged = cache_upkeep.damaged_entries()
    if remove:
        cache_upkeep.remove(damaged)
    _print(damaged, "damaged and removed from" if remove else "damaged in", as_json)
    if damaged and not remove:
        raise FactorFileError(
            f"{some([str(one.path) for one in damaged], most=1)}: damaged; remove them with "
            f"`inilora cache verify --remove`"
        )


def _print(entries: Sequence[Entry], what: str, as_json: bool) -> None:
    total = sum(one.size for one in entries)
    if as_json:
        print(json.dumps({"entries": len(entries), "bytes": total, "folder": str(cache_folder())}))
    else:
        count = f"{len(entries):,} {'entry' if len(entries) == 1 else 'entries'}"
        print(f"{count}, {size_in_words(total)}, {what} {cache_folder()}")


def _measure(name: str, text: str, units: dict[str, int], example: str) -> float:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found.group(2) not in units:
        raise OptionError(f"{name} {text}: give a number and one of {', '.join(filter(None, units))}: {example}")
    return float(found.group(1)) * units[found.group(2)]
