"""What `inilora approximate` does around the run: files refused before it, written after it, and Ctrl-C."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inilora_kernels.cli.main import application
from inilora_kernels.errors import OptionError, OutputError

from .commands import Inilora


def test_ctrl_c_says_what_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inilora_kernels.storage.cache.keep", interrupted)
    command = ["approximate", str(model), "-o", str(tmp_path / "out"), "--solver", "krylov", "--rank", "2"]
    result = CliRunner().invoke(application, command)
    assert result.exit_code == 130
    assert "inilora: stopped: 0 of 2 matrices are finished and kept in" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_would_be_written_over_the_models_shards_is_refused_before_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through another name for the same file, and the plot over the factors of one of several ranks."""
    monkeypatch.setattr("inilora_kernels.cli.running.approximate_each", lambda *_, **__: pytest.fail("it has run"))
    (tmp_path / "link").symlink_to(tmp_path)
    before = model.read_bytes()
    for arguments in (
        ["-o", str(tmp_path / "link" / model.name)],
        ["-o", str(tmp_path / "out"), "--plot", str(model)],
        ["-o", str(tmp_path / "out.png"), "--rank", "2,4", "--plot", str(tmp_path / "out.png")],
    ):
        result = CliRunner().invoke(application, ["approximate", str(model), *arguments])
        assert isinstance(result.exception, OptionError)
        assert "reads or writes that file already; give another name" in str(result.exception)
    assert model.read_bytes() == before


def test_an_output_that_names_a_folder_is_refused_before_the_run(
    model: Path, tmp_path: Path, inilora: Inilora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inilora_kernels.cli.running.approximate_each", lambda *_, **__: pytest.fail("it has run"))
    for arguments in (["-o", f"{tmp_path}/out/"], ["-o", tmp_path / "out", "--plot", f"{tmp_path}/out.png/"]):
        ended = inilora("approximate", model, *arguments)
        assert ended.returncode == 2
        assert "that names a folder; give the name of a file" in ended.stderr
    assert list(tmp_path.iterdir()) == [model]


def test_a_full_disk_is_refused_before_the_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors of two matrices 30×20 at the ranks 2 and 4 take 4·(30 + 20)·(2 + 4)·2 bytes."""
    monkeypatch.setattr(sys.modules["inilora_kernels.approximate"], "survey", lambda *_: pytest.fail("it has run"))
    usage = type("usage", (), {"free": 2399})
    monkeypatch.setattr("inilora_kernels.storage.atomic.shutil.disk_usage", lambda _: usage)
    command = ["approximate", str(model), "-o", str(tmp_path / "out"), "--solver", "krylov", "--rank", "2,4"]
    result = CliRunner().invoke(application, command)
    assert isinstance(result.exception, OutputError)
    assert "free some space" in str(result.exception)
    assert list(tmp_path.iterdir()) == [model]


def test_ctrl_c_before_the_solver_says_so(
    model: Path, tmp_path: Path, inilora: Inilora, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inilora_kernels.cli.running.approximate_each", interrupted)
    done = inilora("approximate", model, "-o", tmp_path / "f.safetensors", "-t", "q_proj")
    assert (done.returncode, done.stderr) == (130, "inilora: stopped before any matrix was solved\n")
    monkeypatch.setattr("inilora_kernels.cli.planning.find_targets", interrupted)
    done = inilora("plan", model)
    assert (done.returncode, done.stderr) == (130, "inilora: stopped\n")
