"""Finished matrices, found again by what they were computed from.

An entry's name is the sha256 of everything that decides its content: the source tensor's bytes, shape and dtype, and
every option that changes the result. So a model may move or be renamed, a run may crash halfway, and no matrix is
computed twice.

An entry is a factor file of one module whose options hold its own key. A flipped bit, which the checksums show, a file
cut short or another matrix's entry counts as no entry. An entry's modification time is that of its last use.
`cache_upkeep.py` lists, checks and removes entries. Nothing is locked: entries are written beside and renamed, and two
processes that compute the same one write the same bytes; `temporary.py` tells their unfinished files from dead ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FactorFileError, OutputError
from ..factors import Factors
from ..places import cache_folder
from . import factor_file
from .atomic import write_whole
from .reading import read_bytes

# Raised whenever a kernel or solver gives different bits for the same options.
RESULT_VERSION = 27

_ENTRY = "matrix"


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """The name of the entry with these ingredients, all of them JSON values.

    >>> cache_key({"rank": 8, "seed": 0}) == cache_key({"seed": 0, "rank": 8}) != cache_key({"rank": 8, "seed": 1})
    True
    """
    versioned = {**ingredients, "format_version": factor_file.FORMAT_VERSION, "result_version": RESULT_VERSION}
    return hashlib.sha256(json.dumps(versioned, sort_keys=True).encode()).hexdigest()


def find(key: str, source_sha256: str) -> Factors | None:
    """The cached factors, or None; an entry that is damaged, or belongs to another key or matrix, counts as None."""
    path = entry_path(key)
    if path is None:
        return None
    try:
        factors = read_entry(path, key)
    except FactorFileError:
        return None
    if factors.source_sha256 != source_sha256:
        return None
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(path)
    return factors


def keep(key: str, factors: Factors) -> None:
    """Store factors. A cache that cannot be written only costs the next run time, so this warns and goes on."""
    path = entry_path(key)
    if path is None:
        _warn("this user has no home folder")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not durable: the checksums show what a power cut has damaged.
        write_whole(path, factor_file.encode({_ENTRY: factors}, {"key": key}), durable=False)
    except OSError as error:
        _warn(error.strerror or str(error))
    except OutputError as error:
        cause = error.__cause__
        _warn((cause.strerror if isinstance(cause, OSError) else None) or str(error))


def read_entry(path: Path, key: str) -> Factors:
    """The factors of the entry at `path`, which must have this key. Raises FactorFileError."""
    modules, options = factor_file.decode(read_bytes(path, FactorFileError), str(path), sealed=True)
    if options.get("key") != key or _ENTRY not in modules:
        raise FactorFileError(f"{path}: the entry of another matrix, {str(options.get('key'))[:12]}…")
    return modules[_ENTRY]


def entry_path(key: str) -> Path | None:
    """Where the entry of a key is, or would be; None without a cache folder."""
    folder = cache_folder()
    return None if folder is None else folder / key[:2] / f"{key}.safetensors"


def _warn(reason: str) -> None:
    # The same words for every matrix, so that Python shows them once per run.
    warnings.warn(
        f"finished matrices are not cached in {cache_folder() or 'any folder'} ({reason}); "
        f"set INILORA_CACHE to a writable folder",
        stacklevel=3,
    )
