"""The command line, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from inilora_kernels import FactorSet
from inilora_kernels.cli.main import COMMANDS, application


def inilora(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inilora_kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({f"layers.0.{name}_proj.weight": torch.randn(30, 20, generator=generator) * 0.05 for name in "qkv"}, path)
    return path


def test_approximate_then_inspect(model: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "factors.safetensors", tmp_path / "plot.png"
    first = inilora("approximate", model, "-o", output, "--rank", "3", "--steps", "200", "--plot", picture)
    assert first.returncode == 0, first.stderr
    assert "layers.0.*" in first.stdout
    assert "q_proj" in first.stdout
    assert "solving" in first.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    factors = FactorSet.load(output)
    assert list(factors) == ["layers.0.q_proj", "layers.0.v_proj"]
    second = inilora("inspect", output)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith(first.stdout)
    assert "σ at r" in second.stdout


def test_a_file_for_each_of_several_ranks(model: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "factors.safetensors", tmp_path / "plot.png"
    result = inilora("approximate", model, "-o", output, "--rank", "2,5", "--solver", "krylov", "--plot", picture)
    assert result.returncode == 0, result.stderr
    for rank in (2, 5):
        factors = FactorSet.load(tmp_path / f"factors-r{rank}.safetensors")
        assert {one.rank for one in factors.values()} == {rank}
        assert (tmp_path / f"plot-r{rank}.png").exists()
    assert not output.exists()


def test_rank_pattern_and_start(model: Path, tmp_path: Path) -> None:
    short, output = tmp_path / "short.safetensors", tmp_path / "factors.safetensors"
    assert inilora("approximate", model, "-o", short, "--rank", "3", "--steps", "50").returncode == 0
    near = inilora("approximate", model, "-o", output, "--rank", "3", "--solver", "krylov", "--start", short)
    assert near.returncode == 0, near.stderr
    patterned = inilora("approximate", model, "-o", output, "--method", "pissa", "--rank-pattern", "v_proj=2")
    assert patterned.returncode == 0, patterned.stderr
    assert [one.rank for one in FactorSet.load(output).values()] == [8, 2]
    refused = inilora("approximate", model, "-o", output, "--rank-pattern", "v_proj")
    assert refused.returncode == 2
    assert "PATTERN=RANK" in refused.stderr


def test_methods_are_listed() -> None:
    assert "inilora-beta-uniform" in inilora("methods").stdout
    listed = json.loads(inilora("methods", "--json").stdout)
    assert listed["pissa"]["solvers"] == ["krylov", "exact"]


def test_json_is_machine_readable(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "factors.safetensors"
    result = inilora(
        "approximate", model, "-o", output, "--rank", "2", "--steps", "100", "-t", "q_proj", "-t", "k_proj", "--json"
    )
    report = json.loads(result.stdout)
    assert set(report["modules"]) == {"layers.0.q_proj", "layers.0.k_proj"}
    one = report["modules"]["layers.0.q_proj"]
    assert one["shape"] == [30, 20]
    assert one["loss"] >= one["optimum"] > 0
    assert report["options"]["rank"] == 2
    assert json.loads(inilora("inspect", output, "--json").stdout) == report


def test_target_modules_may_be_a_regular_expression_or_all_linear(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "factors.safetensors"
    for given, expected in ((r".*\.[qk]_proj", 2), ("all-linear", 3), ("k_proj", 1)):
        result = inilora("approximate", model, "-o", output, "--steps", "0", "-t", given)
        assert result.returncode == 0, result.stderr
        assert len(FactorSet.load(output)) == expected


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
        (["plan", "{model}", "--steps", "-5"], "steps=-5"),
        (["plan", "{model}", "--rank", "9999"], "rank=9999"),
        (["plan", "{model}", "--kernels"], "give --gpu"),
        (["plan", "{model}", "--gpus", "8"], "--gpus 8: of which kind?"),
        (["approximate", "{model}", "-o", "{tmp}/out", "-t", "q_porj", "-t", "v_proj"], 'did you mean "q_proj"'),
        (["inspect", "{model}"], "without factors in it"),
    ],
)
def test_bad_input_gives_one_clear_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    before = set(tmp_path.rglob("*"))
    result = inilora(*[argument.format(tmp=tmp_path, model=model) for argument in arguments])
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("solver", ["adam", "krylov"])
def test_matrices_of_zeros_are_drawn_too(tmp_path: Path, solver: str) -> None:
    model, picture = tmp_path / "model.safetensors", tmp_path / "plot.png"
    save_file({f"layers.0.{name}_proj.weight": torch.zeros(9, 7) for name in "qv"}, model)
    result = inilora(
        "approximate",
        model,
        "-o",
        tmp_path / "out",
        "--rank",
        "2",
        "--steps",
        "5",
        "--solver",
        solver,
        "--plot",
        picture,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_and_version_import_nothing_heavy() -> None:
    helps = [[*name.split(), "--help"] for name in (*COMMANDS, "cache prune")]
    for arguments in (["--help"], ["--version"], ["--show-completion", "bash"], *helps):
        program = (
            "import json, sys; from inilora_kernels.cli.main import main\n"
            f"sys.argv = ['inilora', *{arguments}]\n"
            "try: main()\nfinally: print(json.dumps(list(sys.modules)), file=sys.stderr)"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert not {"torch", "numpy", "transformers", "numba", "matplotlib"} & set(json.loads(result.stderr)), arguments
        assert result.stdout.strip()
    assert re.fullmatch(r"inilora \d+\.\d+\.\d+\S*\n", inilora("--version").stdout)


def test_the_list_of_commands_says_what_each_help_says() -> None:
    listed = " ".join(inilora("--help").stdout.split())
    for name, (module, attribute, summary) in COMMANDS.items():
        found = getattr(import_module(f"inilora_kernels.cli.{module}"), attribute)
        own = found.info.help if isinstance(found, typer.Typer) else found.__doc__.splitlines()[0]
        assert summary == own
        assert f"{name} {summary}" in listed


def test_ctrl_c_says_what_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inilora_kernels.storage.cache.keep", interrupted)
    command = ["approximate", str(model), "-o", str(tmp_path / "out"), "--solver", "krylov", "--rank", "2"]
    result = CliRunner().invoke(application, command)
    assert result.exit_code == 130
    assert "inilora: stopped: 0 of 2 matrices are finished and kept in" in result.stderr
    assert not (tmp_path / "out").exists()
