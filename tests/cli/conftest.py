"""A small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({f"layers.0.{name}_proj.weight": torch.randn(30, 20, generator=generator) * 0.05 for name in "qkv"}, path)
    return path
