"""What PEFT would refuse later is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModel

from inilora_kernels.adapters.export import export_residual
from inilora_kernels.adapters.plan import _all_but
from inilora_kernels.errors import TargetError

from ..factorized import factorize
from .architectures import MAMBA
from .models import save


def test_another_class_than_the_exported_one_is_an_error_and_no_warning(llama: Path, tmp_path: Path) -> None:
    """LlamaFactory 10294: an adapter whose names match nothing trained a fresh LoRA on R."""
    export_residual(llama, factorize(llama, ("q_proj", "v_proj"), rank=2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"modules were (excluded|targeted)"):
        PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "out/base"), tmp_path / "out/adapter")
    assert _all_but(["q_proj"]) is None


def test_mambas_modules_that_peft_refuses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save("MambaForCausalLM", tmp_path / "base", **MAMBA)
    with pytest.raises(TargetError, match=r"PEFT does not take these modules.*out_proj"):
        export_residual(base, factorize(base, ("in_proj", "out_proj"), rank=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
