"""A selection that misses says which names select nothing, and what can be given instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from inilora_kernels.errors import TargetError
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.live import open_live
from inilora_kernels.model.targets import find_targets

from .models import ENCODER, build, found, write
from .refused import refusal


@pytest.mark.skipif(not hasattr(transformers, "NomicBertConfig"), reason="a newer transformers has nomic-bert")
def test_fused_weights_that_transformers_splits_are_no_targets(tmp_path: Path) -> None:
    """nomic-bert's Wqkv was factorized, and then no factors of the model could be attached; the live one has layers."""
    model = build("NomicBertModel", **ENCODER, num_key_value_heads=4, head_dim=6)
    model.save_pretrained(tmp_path)
    splits = r"Wqkv.*, and NomicBertModel splits or permutes it on loading.*factorize the live model"
    for selection in (None, ["Wqkv"], ["q_proj"]):
        with pytest.raises(TargetError, match=splits):
            find_targets(open_checkpoint(tmp_path), selection)
    with pytest.warns(UserWarning, match=r"left out .*Wqkv.*: NomicBertModel splits or permutes"):
        names = [target.module for target in find_targets(open_checkpoint(tmp_path), "all-linear")]
    assert names
    assert not any("Wqkv" in name for name in names)
    assert [target.kind for target in find_targets(open_live(model))] == ["query", "value"] * 2


def test_convolutions_called_as_queries_are_no_defaults(tmp_path: Path) -> None:
    """Janus's VQ model has convolutions q, k and v, for which the default refused the whole model."""
    tensors = {f"text.0.{name}_proj.weight": torch.zeros(4, 4) for name in "qv"}
    write(tmp_path, tensors | {f"vq.0.{name}.weight": torch.zeros(4, 4, 1, 1) for name in "qkv"})
    targets = find_targets(open_checkpoint(tmp_path))
    assert [target.module for target in targets] == ["text.0.q_proj", "text.0.v_proj"]
    build("SqueezeBertModel", **ENCODER, embedding_size=24).save_pretrained(tmp_path / "squeezed")
    assert "no query and value projections found" in refusal(tmp_path / "squeezed", TargetError)


def test_neither_all_linear_nor_mambas_in_proj_is_misread(tmp_path: Path) -> None:
    write(tmp_path, {"norm.weight": torch.zeros(2)})
    assert "did you mean" not in refusal(tmp_path, TargetError, "all-linear")
    build("MambaModel", vocab_size=40, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    assert "no query and value projections found" in refusal(tmp_path / "m", TargetError)


def test_a_query_and_a_value_by_ctrls_names(tmp_path: Path) -> None:
    model = build("CTRLModel", vocab_size=40, n_positions=20, n_embd=24, dff=36, n_layer=1, n_head=4)
    assert [target.module.rpartition(".")[2] for target in found(model, tmp_path)] == ["Wq", "Wv"]
