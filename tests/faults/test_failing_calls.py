"""The fault campaign, call by call: each call to the operating system on a file of the run fails once.

As on a disk that is full, broken, over quota, read-only or without locks, and for want of rights or open files.

The command must end with an error of ours and leave nothing, or succeed with a complete output.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_campaign import actions, copied, judged, originals, remove, snapshot

pytestmark = pytest.mark.slow

__all__ = ["originals"]

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.listdir", "os.scandir"}
REMOVALS = ("os.remove", "os.rmdir")
ERRORS = ("ENOSPC", "EIO", "EACCES", "EROFS", "ESTALE", "EMFILE", "EDQUOT", "ENOLCK", "EPERM")


def fail_at(folder: Path, count: int, name: str, tell: int) -> list[bool]:
    """The count-th call from now on, on a path in `folder`, of flock or of fsync, fails; which, is written to `tell`.

    By Python's audit events, whose hooks cannot be taken back: for a process of its own. True, appended to what this
    returns, ends it.
    """
    calls, ended = [0], list[bool]()
    sync = os.fsync

    def called(event: str) -> None:
        calls[0] += not ended
        if not ended and calls[0] == count:
            os.write(tell, f"{event}|".encode())
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        on_a_path = event in CALLS and isinstance(arguments[0], str | bytes | os.PathLike)
        if event == "fcntl.flock" or (on_a_path and os.fsdecode(arguments[0]).startswith(str(folder))):
            called(event)

    def fsync(descriptor: int) -> None:
        called("fsync")
        sync(descriptor)

    sys.addaudithook(audited)
    os.fsync = fsync
    return ended


def failed(action: Callable[[], Any], out: Path, count: int) -> tuple[str, str]:
    """The call that failed, "" if there are fewer, and the verdict on what the action did then, in a child process."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        ended = fail_at(out.parent, count, ERRORS[count % len(ERRORS)], writer)
        os.write(writer, judged(lambda: (action(), ended.append(True)), out).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as told:
        event, _, verdict = told.read().rpartition("|")
    assert os.waitpid(process, 0)[1] == 0
    return event, verdict


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "name", ["approximate", "approximate by adam", "inspect", "residual", "delta", "convert", "merge", "authors' files"]
)
def test_each_call_fails_once(originals: Path, tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    folder, out = copied(originals, tmp_path), tmp_path / "out"
    inputs = snapshot(folder)
    counts: Counter[str] = Counter()
    for count in range(1, 1000):
        event, verdict = failed(actions(folder, out)[name], out, count)
        if not event:
            assert verdict == "finite"
            break
        what = f"call {count}, {event}, {ERRORS[count % len(ERRORS)]}: {verdict}"
        left = {path.name for path in tmp_path.iterdir()} - {"inputs", "cache"}
        if event in REMOVALS:  # what cannot be removed stays
            left = {path for path in left if not path.startswith(".inilora-")}
        assert verdict in ("refused", "finite"), what
        assert left == (set() if verdict == "refused" or name == "inspect" else {"out"}), what
        assert snapshot(folder) == inputs, what
        counts[verdict] += 1
        remove(out)
        for path in tmp_path.glob(".inilora-*"):
            remove(path)
    print(f"\neach call of {name} fails once: {dict(counts)}")
