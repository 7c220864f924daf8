"""Files and folders that are whole or absent: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError


def require_writable(path: Path) -> None:
    """Raise OutputError now if `write_whole(path, …)` could not succeed later.

    Long work must not end in a file that cannot be written, so the folder is tried with a real temporary file.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    try:
        handle, probe = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another place for the output"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that no reader, and no crash, ever sees half of it. Raises OutputError."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error


def require_new_folder(path: Path) -> None:
    """Raise OutputError if a folder cannot be made at `path`: something is there, or no folder can be written."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputError(f"{path}: already there; give a new folder, or remove this one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`; it takes that name when all went well, and vanishes otherwise.

    Raises OutputError.
    """
    require_new_folder(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
