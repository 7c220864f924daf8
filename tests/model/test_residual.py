"""A residual folder given in place of the original."""

from __future__ import annotations

from pathlib import Path

import pytest

from inilora_kernels import approximate_model
from inilora_kernels.adapters.export import export_residual
from inilora_kernels.errors import CheckpointError

from ..factorized import factorize


def test_the_original_is_named(llama: Path, tmp_path: Path) -> None:
    """Its factors would be those of R."""
    export_residual(llama, factorize(llama, ("q_proj",), rank=2), tmp_path / "out")
    for given in ("base", "base/model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"give the original, {llama}"):
            approximate_model(tmp_path / "out" / given, rank=2, progress=False)
