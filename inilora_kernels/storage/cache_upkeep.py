"""Upkeep of the whole cache, for the user: look at it, check it, and remove entries.

Only files with an entry's name, and what killed runs left, are ever removed: the folder may hold more than the cache.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FactorFileError, OutputError
from ..places import cache_folder
from .cache import read_entry
from .temporary import sweep

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A finished matrix in the cache.

    size: in bytes. last_used: in seconds since 1970.
    """

    path: Path
    size: int
    last_used: float

    @property
    def key(self) -> str:
        return self.path.stem


def entries() -> list[Entry]:
    """All entries, least recently used first; none if there is no cache. Raises OutputError if it cannot be listed."""
    found = []
    for part in _parts():
        try:
            names = os.listdir(part)
        except (FileNotFoundError, PermissionError):  # removed meanwhile, or another user's
            continue
        except OSError as error:
            raise OutputError(f"{part}: cannot be listed: {error.strerror or error}; check the disk") from error
        for path in (part / name for name in names if _NAME.fullmatch(name)):
            # An entry may vanish while another process clears the cache.
            with contextlib.suppress(OSError):
                state = path.lstat()
                if stat.S_ISREG(state.st_mode):
                    found.append(Entry(path, state.st_size, state.st_mtime))
    return sorted(found, key=lambda entry: (entry.last_used, entry.path))


def damaged_entries() -> list[Entry]:
    """The entries whose checksum or key does not match; a run computes such a matrix again."""
    damaged = []
    for entry in entries():
        try:
            read_entry(entry.path, entry.key)
        except FactorFileError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue
            if isinstance(error.__cause__, OSError):
                raise OutputError(str(error)) from error
            damaged.append(entry)
    return damaged


def prune(older_than: float | None = None, to_size: int | None = None) -> list[Entry]:
    """Remove entries not used for `older_than` seconds, then the least recently used until `to_size` bytes are left.
    Returns what was removed. Raises OutputError if an entry cannot be removed."""
    everything = entries()
    now = time.time()
    doomed = [entry for entry in everything if older_than is not None and now - entry.last_used > older_than]
    rest = everything[len(doomed) :]
    if to_size is not None:
        left = sum(entry.size for entry in rest)
        for entry in rest:
            if left <= to_size:
                break
            doomed.append(entry)
            left -= entry.size
    remove(doomed)
    return doomed


def remove(doomed: Iterable[Entry]) -> None:
    """Remove entries, the folders that this empties, and what killed runs left there. Raises OutputError."""
    for entry in doomed:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{entry.path}: cannot be removed: {error.strerror or error}") from error
    for part in _parts():
        sweep(part)
        with contextlib.suppress(OSError):
            part.rmdir()


def _parts() -> list[Path]:
    folder = cache_folder()
    try:
        return sorted(folder.glob("[0-9a-f][0-9a-f]")) if folder is not None and folder.is_dir() else []
    except OSError:  # a name that is too long, another user's folder
        return []
