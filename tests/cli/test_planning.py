"""`inilora plan`: what it predicts, and for how many GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from inilora_kernels.cli.main import application


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Nine matrices of three sizes."""
    sides = {"q": 96, "v": 64, "k": 32}
    tensors = {f"layers.{i}.{kind}_proj.weight": torch.ones(side, 64) for i in range(3) for kind, side in sides.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def planned(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(application, ["plan", *map(str, arguments), "-t", "all-linear", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_several_gpus_share_the_matrices(model: Path) -> None:
    one = planned(model, "--gpu", "h100")["seconds_by_gpu"]
    three = planned(model, "--gpu", "h100", "--gpus", 3)["seconds_by_gpu"]
    assert (len(one), len(three)) == (1, 3)
    assert max(three) < one[0] <= sum(three) * 1.01
    # No more processes than matrices have work.
    assert len(planned(model, "--gpu", "h100", "--gpus", 100)["seconds_by_gpu"]) == 9


def test_what_all_linear_leaves_out_of_a_run_is_left_out_of_its_plan(model: Path, tmp_path: Path) -> None:
    save_file({"a.q_proj.weight": torch.ones(64, 64), "gate.weight": torch.ones(1, 64)}, tmp_path / "thin.safetensors")
    with pytest.warns(UserWarning, match="gate: 1×64 is thinner than the rank"):
        assert planned(tmp_path / "thin.safetensors")["matrices"] == 1


def test_experts_are_planned_too(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"layers.0.experts.down_proj": torch.ones(5, 32, 64)}, file)
    result = CliRunner().invoke(application, ["plan", str(file), "--target-parameters", "experts.down_proj", "--json"])
    assert json.loads(result.stdout)["matrices"] == 5


def test_the_table_says_how_many(model: Path) -> None:
    result = CliRunner().invoke(application, ["plan", str(model), "--gpu", "h100", "--gpus", "2"])
    assert "2 × H100 SXM" in result.output
    assert "2 processes, one a GPU, busy" in result.output


def test_the_direct_solver_is_predicted_for_the_gpu_too(model: Path) -> None:
    found = planned(model, "--gpu", "h100")
    assert found["direct_seconds_by_gpu"][0] > 0
    assert found["gpu"]["host_seconds"] < found["gpu"]["seconds"]
    assert {"copying_seconds", "host_seconds", "losses_seconds", "shapes"} <= set(found["gpu"]["groups"][0])
    table = CliRunner().invoke(application, ["plan", str(model), "--gpu", "h100"]).output
    (row,) = (line for line in table.splitlines() if "krylov" in line)
    # A time here, and one on the card.
    assert row.count("second") + row.count(" ms") >= 2


def test_more_gpus_than_matrices_take_no_longer(model: Path) -> None:
    arguments = [
        "plan",
        str(model),
        "-t",
        "all-linear",
        "--rank",
        "4",
        "--gpu",
        "h100",
        "--gpus",
        str(10**12),
        "--json",
    ]
    result = CliRunner().invoke(application, arguments)
    assert len(json.loads(result.stdout)["seconds_by_gpu"]) == 9
