"""Temporary files and folders next to an output: locked while their process lives, removed once it is dead.

A process that is killed cannot clean up. So each temporary name is held by an flock, which the kernel drops with the
process: a later process at the same place can tell a dead one from one in use, even across containers, and removes it.
On a file system without locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

if sys.platform != "win32":
    import fcntl

PREFIX = ".inilora-"
_ENDINGS = ("SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Temporary:
    """A file or folder under a temporary name, and the descriptor that holds its lock; -1 if there is none."""

    path: Path
    descriptor: int

    def close(self) -> None:
        """Release the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def discard(self) -> None:
        """Release the lock and remove the file or folder; warn of what cannot be removed."""
        self.close()  # first, for a process that has no more files to open
        try:
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"an unfinished output is left, {self.path} ({reason}); remove it", stacklevel=4)


def temporary_file(folder: Path) -> Temporary:
    """A new empty file in `folder`, open for writing; its mode follows the umask. Raises OSError."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        if _hold(path, descriptor):
            return Temporary(path, descriptor)


def temporary_folder(folder: Path) -> Temporary:
    """A new empty folder in `folder`; its mode follows the umask. Raises OSError."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}"
        path.mkdir()
        if sys.platform == "win32":  # which cannot open folders
            return Temporary(path, -1)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            continue
        except OSError:  # too many open files, say
            path.rmdir()
            raise
        if _hold(path, descriptor):
            return Temporary(path, descriptor)


def sweep(folder: Path) -> None:
    """Remove what this user's killed runs left in `folder`, and warn of it.

    A folder is renamed before it is emptied, so that its owner, should the locks fail to show it, cannot finish with
    part of it.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(PREFIX)]
    except OSError:
        return
    removed, kept = 0, []
    for path in found:
        try:
            removed += _remove_if_dead(path)
        except OSError:
            kept.append(path)
    if removed:
        warnings.warn(
            f"removed {removed} unfinished output{'s' if removed > 1 else ''} of killed runs from {folder}",
            stacklevel=3,
        )
    if kept:
        warnings.warn(f"killed runs left {', '.join(map(str, kept))}; remove them to free their space", stacklevel=3)


@contextlib.contextmanager
def ended_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP first raise an exception out of this block, so that it cleans up, and then end the process.

    Only in the main thread, and only if nothing else handles them.
    """
    names = [name for name in _ENDINGS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        # A second signal must not cut the cleanup short.
        if not received:
            received.append(number)
            raise _Ended

    mine = [getattr(signal, name) for name in names if signal.getsignal(getattr(signal, name)) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, leave)
    try:
        yield
    except _Ended:
        if not received:
            raise
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


class _Ended(BaseException):
    """A signal to end the process has arrived."""


def _hold(path: Path, descriptor: int) -> bool:
    """Lock a new name; False if another process has mistaken it for a dead one in the meantime."""
    _lock(descriptor)
    try:
        mine = os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        mine = False
    if not mine:
        os.close(descriptor)
    return mine


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is now ours; None if there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_if_dead(path: Path) -> bool:
    state = os.lstat(path)
    if stat.S_ISLNK(state.st_mode) or (hasattr(os, "geteuid") and state.st_uid != os.geteuid()):
        return False
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not _lock(descriptor):
            return False
        if stat.S_ISDIR(state.st_mode):
            grave = path.with_name(f"{PREFIX}{secrets.token_hex(8)}")
            path.rename(grave)
            shutil.rmtree(grave)
        else:
            path.unlink()
        return True
    finally:
        os.close(descriptor)
