"""Temporary outputs of processes that were ended or killed."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import pytest

from inilora_kernels.storage.atomic import (
    require_new_folder,
    require_writable,
    whole_folder,
    write_whole,
)


def killed(out: Path, call: str, number: signal.Signals, kind: str) -> int:
    """How a process ended that a signal met in the middle of writing `out`, at its call of os.fsync, os.replace, …"""

    def die(*arguments: object, **more: object) -> None:
        os.kill(os.getpid(), number)

    process = os.fork()
    if not process:
        try:
            setattr(Path if call == "rename" else os, call, die)
            if kind == "file":
                write_whole(out, b"new")
            else:
                with whole_folder(out) as folder:
                    (folder / "file").write_bytes(b"new")
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize(
    ("call", "kind"), [("fsync", "file"), ("replace", "file"), ("fsync", "folder"), ("rename", "folder")]
)
def test_a_termination_cleans_up_and_a_kill_is_swept(tmp_path: Path, call: str, kind: str) -> None:
    out = tmp_path / "some" / "out" if kind == "folder" else tmp_path / "out"
    assert killed(out, call, signal.SIGTERM, kind) == -signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert killed(out, call, signal.SIGKILL, kind) == -signal.SIGKILL
    assert not out.exists()
    assert list(out.parent.iterdir())
    with pytest.warns(UserWarning, match="removed 1 unfinished output"):
        (require_new_folder if kind == "folder" else require_writable)(out)
    assert not list(out.parent.iterdir())


def test_an_output_in_use_is_not_swept(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with whole_folder(tmp_path / "one") as folder:
            require_new_folder(tmp_path / "two")
            with whole_folder(tmp_path / "three"):
                pass
            assert folder.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]
