"""Files and folders that are complete or absent: written next to their place, synced, renamed.

Only regular files are ever replaced, never a link, device or pipe, and nothing in the folder of a model or an adapter.
Modes follow the umask. What can be known before long work (an unwritable place, a full disk) is refused before it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError
from ..places import require_no_tilde
from .temporary import Temporary, ended_cleanly, sweep, temporary_file, temporary_folder

# What marks a folder as a model's or an adapter's, and the names in it that their loaders look for.
_MARKS = ("config.json", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_LOADED = re.compile(r".*config\.json|.*\.index\.json|(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin)")

_ADVICE = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "your quota is full; free some space or choose another place",
    errno.EFBIG: "its file system, or `ulimit -f`, allows no file of that size; choose another place",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make its folder first, or choose another place",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
}


def require_writable(path: Path, size: int = 0) -> None:
    """Raise OutputError now if `write_whole(path, …)` could not succeed later; remove what killed runs left there.

    size: bytes that will be written, as far as known; that much must be free.

    Long work must not end in a file that cannot be written, so a real temporary file is tried in the folder.
    """
    _require_replaceable(path)
    with _reporting(path):
        sweep(path.parent)
        probe = temporary_file(path.parent)
        probe.close()
        _remove_probe(probe.path, path)
    _require_space(path, size)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put `content` at `path` so that no reader, and no crash, ever sees half of it. Raises OutputError.

    durable: wait until it is on the disk. Without that, a power cut (though not a crash of the process) may leave a
        file of zeros; for files with a checksum only.
    """
    _require_replaceable(path)
    with _reporting(path), ended_cleanly():
        if durable:
            sweep(path.parent)
        temporary = temporary_file(path.parent)
        try:
            with os.fdopen(os.dup(temporary.descriptor), "wb") as stream:
                stream.write(content)
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.replace(temporary.path, path)
            if durable:
                _sync_name(path)
        except BaseException:
            temporary.discard()
            raise
        temporary.close()


def require_new_folder(path: Path, size: int = 0) -> None:
    """Raise OutputError if a folder of `size` bytes cannot be created at `path`; creates nothing yet.

    An empty folder may exist, and parents may be missing.
    """
    require_no_tilde(path)
    with _reporting(path):
        if path.is_symlink():
            raise OutputError(f"{path}: a symbolic link; give the folder that it points to, or another name")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path}: already there; give a new folder, or remove this one")
        if os.path.ismount(path):
            raise OutputError(f"{path}: a mount point, which cannot be renamed; give a new folder in it")
        parent = _nearest(path)
        if not parent.is_dir():
            raise OutputError(f"cannot write {path}: {parent} is not a folder; choose another place")
        for part in path.absolute().relative_to(parent).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(parent / part)  # raises if the file system does not allow the name
        sweep(parent)
        probe = temporary_folder(parent)
        probe.close()
        _remove_probe(probe.path, path)
    _require_space(path, size)


@contextlib.contextmanager
def whole_folder(path: Path, size: int = 0) -> Iterator[Path]:
    """A folder to fill, next to `path`; it takes that name if all goes well, and vanishes otherwise.

    size: bytes that will be written, as far as known; that much must be free.

    On an error and on SIGTERM, parents created for it vanish too. What SIGKILL leaves is removed by the next output at
    that place. Raises OutputError.
    """
    require_new_folder(path, size)
    made: list[Path] = []
    temporary: Temporary | None = None
    finished = False
    with ended_cleanly():
        try:
            with _reporting(path):
                _make_parents(path.parent, made)
                temporary = temporary_folder(path.parent)
                yield temporary.path
                _sync_all(temporary.path)
                _take_name(temporary.path, path)
                finished = True
                _sync_name(path)
        finally:
            if temporary is not None:
                temporary.close() if finished else temporary.discard()
            if not finished:
                for folder in reversed(made):
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file into a folder from `whole_folder`, straight from the tensors. Raises OutputError.

    safetensors gives its files mode 0600; this one follows the umask.
    """
    with _reporting(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        save_file(unshared(tensors), path, metadata=dict(metadata or {"format": "pt"}))
        os.chmod(path, mode)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in its own memory, as safetensors demands; copies where two share memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _require_replaceable(path: Path) -> None:
    with _reporting(path):
        folder = path.parent
        protected = next((mark for mark in _MARKS if (folder / mark).is_file()), None)
        if protected is not None and _LOADED.fullmatch(path.name):
            raise OutputError(
                f"cannot write {path}: {protected} makes this the folder of a model or an adapter, which would be "
                f"loaded with that file; choose another place"
            )
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise OutputError(f"cannot write {path}: it is a folder; give a file name")
        if stat.S_ISLNK(mode):
            raise OutputError(
                f"cannot write {path}: it is a symbolic link; give the file it points to, or another name"
            )
        if not stat.S_ISREG(mode):
            raise OutputError(
                f"cannot write {path}: a device, pipe or socket, which is never replaced; give a file name"
            )
        if protected is not None:
            raise OutputError(
                f"cannot write {path}: already there, in the folder of a model or an adapter ({protected}), where "
                f"nothing is replaced; choose another name, or remove that file first"
            )


def _require_space(path: Path, size: int) -> None:
    if not size:
        return
    with _reporting(path):
        free = shutil.disk_usage(_nearest(path)).free
    if free < size:
        raise OutputError(
            f"cannot write {path}: it takes about {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there; "
            f"free some space or choose another place"
        )


def _nearest(path: Path) -> Path:
    """The nearest existing parent."""
    parent = path.absolute().parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    return parent


def _remove_probe(probe: Path, path: Path) -> None:
    try:
        probe.rmdir() if probe.is_dir() else probe.unlink()
    except OSError as error:  # a folder to which things can only be added
        raise OutputError(
            f"cannot write {path}: {probe}, which was made to try it, cannot be removed ({error.strerror or error}); "
            f"choose another place"
        ) from error


def _take_name(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputError(f"cannot write {path}: another run has made it meanwhile; choose another name") from error


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create a folder and its parents, adding each new one to `made`."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        try:
            parent.mkdir()
        except FileExistsError:  # another run has created it meanwhile
            continue
        made.append(parent)


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn OSError and safetensors' errors into OutputError, with advice."""
    try:
        yield
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}; free some space or choose another place") from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "choose another place for the output")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def _sync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent) / file)
        _sync(Path(parent))


def _sync_name(path: Path) -> None:
    """Sync the folder that holds the name; the output is complete by now, so that a failure is only told."""
    try:
        _sync(path.parent)
    except OSError as error:  # a folder that may not be listed, or a file system that cannot sync one
        warnings.warn(
            f"{path} is complete, but a power cut within seconds might undo it: its folder cannot be synced "
            f"({error.strerror or error})",
            stacklevel=4,
        )


def _sync(path: Path) -> None:
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
