"""Outputs are whole or absent, replace regular files alone, and leave nothing behind, killed or not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inilora_kernels.errors import OutputError
from inilora_kernels.storage.atomic import (
    require_new_folder,
    require_writable,
    save_tensors,
    whole_folder,
    write_whole,
)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"content")
    with whole_folder(tmp_path / "folder") as folder:
        save_tensors(folder / "tensors", {"a": torch.ones(2)})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o644, "folder": 0o755, "tensors": 0o644}


@pytest.mark.parametrize("check", [require_writable, lambda path: write_whole(path, b"new")])
def test_only_regular_files_are_replaced(tmp_path: Path, check: object) -> None:
    assert callable(check)
    pipe, link, dangling, target = (tmp_path / name for name in ("pipe", "link", "dangling", "target"))
    os.mkfifo(pipe)
    target.write_bytes(b"old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nowhere")
    for path, message in ((pipe, "pipe"), (link, "symbolic link"), (dangling, "symbolic link"), (tmp_path, "folder")):
        before = os.lstat(path)
        with pytest.raises(OutputError, match=message):
            check(path)
        assert os.lstat(path).st_ino == before.st_ino
    assert target.read_bytes() == b"old"
    check(target)


def test_nothing_in_a_models_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(OutputError, match=name):
            write_whole(tmp_path / name, b"new")
    # Names that loaders would take up, too.
    for name in ("model.safetensors", "model.safetensors.index.json", "generation_config.json", "pytorch_model.bin"):
        with pytest.raises(OutputError, match=name):
            require_writable(tmp_path / name)
    write_whole(tmp_path / "factors.safetensors", b"new")
    with pytest.raises(OutputError, match="already there"):
        require_writable(tmp_path / "factors.safetensors")
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"{}", b"new"}


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    long = "x" * 300
    (tmp_path / "file").write_bytes(b"")
    for check in (require_writable, require_new_folder):
        with pytest.raises(OutputError, match="shorter name"):
            check(tmp_path / long)
        with pytest.raises(OutputError, match="MB are free"):
            check(tmp_path / "new", 1 << 60)
        with pytest.raises(OutputError, match="file"):
            check(tmp_path / "file" / "new")
    with pytest.raises(OutputError, match="make its folder"):
        require_writable(tmp_path / "nowhere" / "new")
    require_writable(tmp_path / ("x" * 250))
    require_new_folder(tmp_path / "some" / "parents" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_no_parents(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "some" / "parents" / "new") as folder:
            (folder / "file").write_bytes(b"new")
            raise KeyError("failed")

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_the_loser_of_a_race_is_told_so(tmp_path: Path) -> None:
    out = tmp_path / "new"

    def lose() -> None:
        with whole_folder(out), whole_folder(out) as winner:
            (winner / "theirs").write_bytes(b"")

    with pytest.raises(OutputError, match="another run has made it"):
        lose()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "theirs"]


def test_an_error_from_elsewhere_is_not_called_a_race(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File exists"), whole_folder(tmp_path / "new") as folder:
        folder.mkdir()


def test_a_folder_that_cannot_be_synced_costs_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse to sync folders, and one may be writable without being readable."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(UserWarning, match="is complete, but a power cut"):
        write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_made_to_try_a_place_is_named_if_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder to which things can only be added, `chattr +a`."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(OutputError, match=r"\.inilora-.* cannot be removed"):
        require_writable(tmp_path / "file")
    with pytest.raises(OutputError, match=r"\.inilora-.* cannot be removed"):
        require_new_folder(tmp_path / "folder")


def test_without_more_files_to_open_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens = os.open

    def open_files(path: Path, *arguments: object, **more: object) -> int:
        if Path(path).is_dir():
            raise OSError(errno.EMFILE, "Too many open files")
        return opens(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_files)
    with pytest.raises(OutputError, match="ulimit -n"):
        require_new_folder(tmp_path / "folder")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
