"""Where this library keeps what it may need again, between runs, and which names a file of results may have."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from .errors import OutputError


def file_to_write(given: str | os.PathLike[str]) -> Path:
    """The path of a file to write. Raises OutputError where a folder is meant: Path forgets a last "/".

    >>> file_to_write("results/")
    Traceback (most recent call last):
    inilora_kernels.errors.OutputError: cannot write results/: that names a folder; give the name of a file
    """
    text = os.fspath(given)
    if os.path.basename(text) in ("", os.curdir, os.pardir):
        raise OutputError(f"cannot write {text}: that names a folder; give the name of a file")
    return Path(text)


def cache_folder() -> Path | None:
    """`$INILORA_CACHE`, or `inilora` in the user's cache folder (XDG); None for a user without a home."""
    override = os.environ.get("INILORA_CACHE")
    try:
        # platformdirs leaves ~ unexpanded where there is no home; no folder may get that name.
        return (Path(override) if override else user_cache_path("inilora")).expanduser().absolute()
    except RuntimeError:
        return None


def private_folder(name: str) -> Path | None:
    """A folder in the cache that only this user can write to; None if there is no such folder."""
    cache = cache_folder()
    if cache is None or not hasattr(os, "geteuid"):
        return cache and cache / name
    folder = cache / f"{name}-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    mine = state.st_uid == os.geteuid() and not state.st_mode & 0o022 and folder.is_dir() and not folder.is_symlink()
    return folder if mine and os.access(folder, os.W_OK) else None
