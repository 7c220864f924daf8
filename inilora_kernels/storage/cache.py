"""Finished matrices, found again by what they were made from.

An entry's name is the sha256 of everything that decides its content: the source tensor's bytes, shape and dtype, and
every option that changes the result. So a model may move or be renamed, a run may crash half-way, and no matrix is
computed twice. An entry is a factor file of one module.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from ..errors import FactorFileError, OutputError
from ..factors import FORMAT_VERSION, Factors, FactorSet
from .atomic import write_whole

_ENTRY = "matrix"

# Raised whenever a kernel or solver gives different bits for the same options.
RESULT_VERSION = 3


def cache_folder() -> Path:
    """`$INILORA_CACHE`, or `inilora` in the user's cache folder (XDG)."""
    override = os.environ.get("INILORA_CACHE")
    return Path(override) if override else user_cache_path("inilora")


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """The name of the entry made from these ingredients, JSON values all.

    >>> cache_key({"rank": 8, "seed": 0}) == cache_key({"seed": 0, "rank": 8}) != cache_key({"rank": 8, "seed": 1})
    True
    """
    versioned = {**ingredients, "format_version": FORMAT_VERSION, "result_version": RESULT_VERSION}
    return hashlib.sha256(json.dumps(versioned, sort_keys=True).encode()).hexdigest()


def find(key: str) -> Factors | None:
    """The cached factors, or None; a damaged entry counts as none."""
    try:
        return FactorSet.load(_path(key))[_ENTRY]
    except FactorFileError:
        return None


def keep(key: str, factors: Factors) -> None:
    """Store factors. A cache that cannot be written costs the next run its time, so it warns and goes on."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, FactorSet({_ENTRY: factors}, {}).to_bytes())
    except (OSError, OutputError) as error:
        warnings.warn(f"this result is not cached: {error}; set INILORA_CACHE to a writable folder", stacklevel=2)


def _path(key: str) -> Path:
    return cache_folder() / key[:2] / f"{key}.safetensors"
