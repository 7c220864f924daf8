"""`inilora approximate`, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels import FactorSet

from .commands import Inilora, in_a_process


def test_approximate_then_inspect(model: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "factors.safetensors", tmp_path / "plot.png"
    first = in_a_process("approximate", model, "-o", output, "--rank", "3", "--steps", "200", "--plot", picture)
    assert first.returncode == 0, first.stderr
    assert "layers.0.*" in first.stdout
    assert "q_proj" in first.stdout
    assert "solving" in first.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    factors = FactorSet.load(output)
    assert list(factors) == ["layers.0.q_proj", "layers.0.v_proj"]
    second = in_a_process("inspect", output)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith(first.stdout)
    assert "σ at r" in second.stdout


def test_a_file_for_each_of_several_ranks(model: Path, tmp_path: Path, inilora: Inilora) -> None:
    output, picture = tmp_path / "factors.safetensors", tmp_path / "plot.png"
    result = inilora("approximate", model, "-o", output, "--rank", "2,5", "--solver", "krylov", "--plot", picture)
    assert result.returncode == 0, result.stderr
    for rank in (2, 5):
        factors = FactorSet.load(tmp_path / f"factors-r{rank}.safetensors")
        assert {one.rank for one in factors.values()} == {rank}
        assert (tmp_path / f"plot-r{rank}.png").exists()
    assert not output.exists()


def test_rank_pattern_and_start(model: Path, tmp_path: Path, inilora: Inilora) -> None:
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


def test_target_modules_may_be_a_regular_expression_or_all_linear(
    model: Path, tmp_path: Path, inilora: Inilora
) -> None:
    output = tmp_path / "factors.safetensors"
    for given, expected in ((r".*\.[qk]_proj", 2), ("all-linear", 3), ("k_proj", 1)):
        result = inilora("approximate", model, "-o", output, "--steps", "0", "-t", given)
        assert result.returncode == 0, result.stderr
        assert len(FactorSet.load(output)) == expected


@pytest.mark.parametrize("solver", ["adam", "krylov"])
def test_matrices_of_zeros_are_drawn_too(tmp_path: Path, solver: str, inilora: Inilora) -> None:
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
