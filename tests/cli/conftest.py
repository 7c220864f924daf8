"""A small checkpoint, and the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inilora_kernels.cli.main import main

from .commands import Ended, Inilora


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({f"layers.0.{name}_proj.weight": torch.randn(30, 20, generator=generator) * 0.05 for name in "qkv"}, path)
    return path


@pytest.fixture
def inilora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inilora:
    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr("sys.argv", ["inilora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Ended(int(stopped.value.code or 0), *capsys.readouterr())

    return run
