"""What users hand in besides paths and tensors: taken where it makes sense, otherwise refused in one clear line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inilora_kernels import FactorSet, InitializationError, approximate, approximate_model


def test_arrays_and_linear_layers_are_matrices_too() -> None:
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(5, 6)
    with torch.no_grad():
        layer.weight.copy_(W)
    expected = approximate(W, rank=2, solver="krylov").product()
    for same in (W.numpy(), layer):
        assert torch.equal(approximate(same, rank=2, solver="krylov").product(), expected)
    several = approximate([W, layer, W.numpy()], rank=2, solver="krylov")
    assert all(torch.equal(one.product(), expected) for one in several)


@pytest.mark.parametrize("given", [np.eye(3, dtype=np.int64), "matrix", {"weight": torch.eye(3)}, nn.Conv2d(1, 1, 1)])
def test_what_is_no_matrix_is_refused(given: Any) -> None:
    with pytest.raises(InitializationError, match="give a float tensor, a float array or a linear layer"):
        approximate(given if not isinstance(given, str) else [given], rank=1)


@pytest.mark.parametrize("given", [torch.eye(2), np.eye(2), None])
def test_what_is_no_model_is_answered_with_what_to_give(given: Any) -> None:
    with pytest.raises(InitializationError, match=f"was given a {type(given).__name__}; give a model's path or hub id"):
        approximate_model(given)


def test_factors_by_an_incomplete_name(minilm_factors: FactorSet) -> None:
    with pytest.raises(KeyError) as unknown:
        minilm_factors["query"]
    assert str(unknown.value) == (
        "no factors for 'query' among 12 matrices; encoder.layer.0.attention.self.query, "
        "encoder.layer.1.attention.self.query, encoder.layer.2.attention.self.query and 3 more end in that name"
    )
    with pytest.raises(InitializationError, match=r'did you mean "encoder.layer.0.attention.self.query"'):
        minilm_factors["encoder.layer.0.attention.self.quary"]
    assert minilm_factors.get("query") is None
    assert "query" not in minilm_factors


def test_a_notebook_shows_the_table(minilm_factors: FactorSet) -> None:
    shown = minilm_factors._repr_html_()
    assert shown.startswith("<pre")
    assert "encoder.layer.*.attention.self.*" in shown
    assert "384×384" in shown
