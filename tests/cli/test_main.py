"""The command line, as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from inilora_kernels.cli.main import COMMANDS

from .commands import Inilora, in_a_process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["approximate", "no/such/model", "-o", "{tmp}/out"], "no/such/model"),
        (["approximate", "{model}", "-o", "{tmp}/no/such/folder/out"], "cannot write"),
        (["approximate", "{model}", "-o", "{tmp}"], "folder"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--rank", "21"], "rank 21"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--plot", "{tmp}/plot.txt"], ".png"),
        (["approximate", "{model}", "-o", "{tmp}/out", "-t", "nothing"], "nothing"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--no-such-option"], "--no-such-option"),
        (["approximate", "{model}", "-o", "{model}"], "another name"),
        (["approximate", "{model}", "-o", "{tmp}/out.png", "--plot", "{tmp}/out.png"], "another name"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--device", "nonsense"], "device='nonsense'"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--steps", "300", "--lr", "1e30", "--no-progress"], "diverged"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--rank", "99999999999999999999"], "take rank ≤ 20"),
        (["approximate", "{model}", "-o", "{tmp}/out", "--start", ""], "a path is empty"),
        (["approximate", "{model}", "-o", "~/out"], "~ stands for your home folder"),
        (["inspect", ""], "a path is empty"),
        (["inspect", "{tmp}/factors", "--base", "{model}"], "--base is for an authors' folder"),
        (["convert", "", "--init", "{model}", "-o", "{tmp}/out"], "a path is empty"),
        (["convert", "{tmp}", "--init", " ", "-o", "{tmp}/out"], "a path is empty"),
        (["export", "{model}", "--base", "{model}", "-o", ""], "the path to write is empty"),
        (["export", "{model}", "--base", "{model}", "-o", "~/out"], "~ stands for your home folder"),
        (["export", "{model}", "-o", "{tmp}/out", "--format", "inilora-pt", "--form", "delta"], "--form"),
        (["plan", "{model}", "--steps", "-5"], "steps=-5"),
        (["plan", "{model}", "--rank", "9999"], "rank=9999"),
        (["plan", "{model}", "--kernels"], "give --gpu"),
        (["plan", "{model}", "--gpus", "8"], "--gpus 8: of which kind?"),
        (["approximate", "{model}", "-o", "{tmp}/out", "-t", "q_porj", "-t", "v_proj"], 'did you mean "q_proj"'),
        (["inspect", "{model}"], "without factors in it"),
    ],
)
def test_bad_input_gives_one_clear_line(
    model: Path, tmp_path: Path, arguments: list[str], message: str, inilora: Inilora
) -> None:
    before = set(tmp_path.rglob("*"))
    result = inilora(*[argument.format(tmp=tmp_path, model=model) for argument in arguments])
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert set(tmp_path.rglob("*")) == before


def test_a_refused_process_ends_with_status_2(model: Path, tmp_path: Path) -> None:
    result = in_a_process("approximate", model, "-o", tmp_path / "out", "-t", "nothing")
    assert result.returncode == 2
    assert result.stderr.startswith("inilora: ")
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_help_and_version_import_nothing_heavy() -> None:
    # Otherwise typer looks for the shell among the parents, and under `make` finds sh, which has no completion.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    helps = [[*name.split(), "--help"] for name in (*COMMANDS, "cache prune")]
    for arguments in (["--help"], ["--version"], ["--show-completion", "bash"], *helps):
        program = (
            "import json, sys; from inilora_kernels.cli.main import main\n"
            f"sys.argv = ['inilora', *{arguments}]\n"
            "try: main()\nfinally: print(json.dumps(list(sys.modules)), file=sys.stderr)"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert not {"torch", "numpy", "transformers", "numba", "matplotlib"} & set(json.loads(result.stderr)), arguments
        assert result.stdout.strip()
    assert re.fullmatch(r"inilora \d+\.\d+\.\d+\S*\n", in_a_process("--version").stdout)


def test_the_list_of_commands_says_what_each_help_says() -> None:
    listed = " ".join(in_a_process("--help").stdout.split())
    for name, (module, attribute, summary) in COMMANDS.items():
        found = getattr(import_module(f"inilora_kernels.cli.{module}"), attribute)
        own = found.info.help if isinstance(found, typer.Typer) else found.__doc__.splitlines()[0]
        assert summary == own
        assert f"{name} {summary}" in listed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_standard_output_is_one_clear_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "inilora_kernels", "--help"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "inilora: cannot write to the standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_messages_that_nobody_takes_do_not_cost_the_result(model: Path, tmp_path: Path) -> None:
    arguments = ["approximate", str(model), "-o", str(tmp_path / "out"), "--solver", "krylov", "-t", "all-linear"]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "inilora_kernels", *arguments]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert result.returncode == 0
    assert (tmp_path / "out").exists()


def test_no_more_files_to_open_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another package too: matplotlib opens its fonts when it draws."""

    def draw() -> None:
        raise OSError(errno.EMFILE, "Too many open files", "DejaVuSans.ttf")

    main = import_module("inilora_kernels.cli.main")
    monkeypatch.setattr(main, "application", draw)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "inilora: too many open files, nothing was written; raise the limit" in capsys.readouterr().err


@pytest.mark.parametrize(("patience", "status", "said"), [("60", 0, "cleaned\n"), ("-1", 130, "")])
def test_a_second_interrupt_cuts_no_cleanup_short_a_later_one_ends_all(patience: str, status: int, said: str) -> None:
    script = f"""
import os, signal
import sys, inilora_kernels.cli.main; main = sys.modules["inilora_kernels.cli.main"]
main._PATIENCE = {patience}
signal.signal(signal.SIGINT, signal.default_int_handler)
main.stop_once()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    print("cleaned", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, said)


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path: Path, inilora: Inilora) -> None:
    """Names come from files, and those from strangers."""
    save_file({"a.\x1b[31mred.q_proj.weight": torch.full((8, 8), torch.nan)}, tmp_path / "model.safetensors")
    error = inilora("approximate", tmp_path, "-o", tmp_path / "out", "-t", "q_proj", "--rank", "2").stderr
    assert r"\x1b[31mred" in error
    assert "\x1b" not in error
