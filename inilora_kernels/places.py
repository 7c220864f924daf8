"""Where this library keeps what it may need again, between runs, and which names a file of results may have."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import FactorFileError, OutputError


def file_to_write(given: str | os.PathLike[str]) -> Path:
    """The path of a file to write. Raises OutputError where a folder is meant: Path forgets a last "/".

    >>> file_to_write("results/")
    Traceback (most recent call last):
    inilora_kernels.errors.OutputError: cannot write results/: that names a folder; give the name of a file
    """
    text = os.fspath(given)
    if os.path.basename(text) in ("", os.curdir, os.pardir):
        raise OutputError(f"cannot write {text}: that names a folder; give the name of a file")
    require_no_tilde(Path(text))
    return Path(text)


def require_no_tilde(path: Path) -> None:
    """Raise OutputError for a home folder that no shell has spelled out, as in --output=~/x.

    A folder called ~ would be made, and the next thing that its owner does is rm -r ~.
    """
    home = os.path.expanduser(path)
    if Path(home) != path:
        raise OutputError(f"cannot write {path}: ~ stands for your home folder in a shell alone; give {home}")


def given_path(given: str | os.PathLike[str]) -> Path:
    """The path of factors, or of an adapter. Raises FactorFileError for an empty one.

    Path("") is the folder where one happens to be; a variable that is not set must not choose it.

    >>> given_path("")
    Traceback (most recent call last):
    inilora_kernels.errors.FactorFileError: a path is empty; is the variable set that it is taken from?
    """
    if not os.fspath(given).strip():
        raise FactorFileError("a path is empty; is the variable set that it is taken from?")
    return Path(given)


def folder_to_write(given: str | os.PathLike[str]) -> Path:
    """The path of a folder to write. Raises OutputError for an empty one, and a home folder that is not spelled out."""
    if not os.fspath(given).strip():
        raise OutputError("the path to write is empty; is the variable set that it is taken from?")
    require_no_tilde(Path(given))
    return Path(given)


def cache_folder() -> Path | None:
    """`$INILORA_CACHE`, or `inilora` in the user's cache folder (XDG); None for a user without a home."""
    from platformdirs import user_cache_path

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
