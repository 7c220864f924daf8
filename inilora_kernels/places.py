"""Where this library keeps what it may need again, between runs."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


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
