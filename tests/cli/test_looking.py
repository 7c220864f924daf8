"""`inilora inspect`."""

from __future__ import annotations

import json
from pathlib import Path

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
