"""`inilora inspect`."""

from __future__ import annotations

import json
from pathlib import Path

from inilora_kernels import FactorSet, approximate_model, save_inilora_pt

from .commands import Inilora


def test_json_is_machine_readable(model: Path, tmp_path: Path, inilora: Inilora) -> None:
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


def test_an_authors_folder_is_shown_without_its_model(model: Path, tmp_path: Path, inilora: Inilora) -> None:
    factors = approximate_model(model, rank=2, solver="krylov", cache=False, progress=False)
    save_inilora_pt(factors, tmp_path / "pt")
    done = inilora("inspect", tmp_path / "pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "not known without their model" in done.stdout.replace("\n", " ")
    assert "nan" not in done.stdout
    assert "nan" not in repr(FactorSet.load(tmp_path / "pt"))
    assert all(
        one["loss"] is None
        for one in json.loads(inilora("inspect", tmp_path / "pt", "--json").stdout)["modules"].values()
    )
    refused = inilora("inspect", tmp_path / "pt", "--plot", tmp_path / "plot.png")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "give the model as --base" in refused.stderr
    assert not (tmp_path / "plot.png").exists()
    assert inilora("inspect", tmp_path / "pt", "--base", model, "--plot", tmp_path / "plot.png").returncode == 0
