"""Arrays, tensors and layers as matrices: their values when they are read, and their sha256."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from inilora_kernels.errors import WeightError
from inilora_kernels.model.files import tensor
from inilora_kernels.model.in_memory import target_in_memory

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_views_are_read_and_hashed_by_their_values(dtype: torch.dtype) -> None:
    whole = torch.zeros(12, 5, dtype=dtype)
    whole[::2, 1:] = W.to(dtype)
    target = target_in_memory("it", whole[::2, 1:])
    assert target.shape == (6, 4)
    assert target.dtype == dtype
    assert torch.equal(target.read(), W.to(dtype))
    assert target.read().is_contiguous()
    assert target.sha256() == hashlib.sha256(W.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("at_a_time", [1, 40, 1 << 20])
def test_rows_are_hashed_a_few_at_a_time(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "_BLOCK", at_a_time)
    target = target_in_memory("it", W.T)
    assert target.blocks is not None
    assert torch.equal(torch.cat([block.clone() for block in target.blocks()]), W.T)
    assert target.sha256() == hashlib.sha256(W.T.contiguous().numpy().tobytes()).hexdigest()


def test_a_layer_stands_for_its_weight_and_an_array_for_itself() -> None:
    layer = nn.Linear(4, 6)
    layer.weight.data.copy_(W)
    reversed_rows = W.numpy()[::-1]
    assert torch.equal(target_in_memory("layer", layer).read(), W)
    assert torch.equal(target_in_memory("array", reversed_rows).read(), W.flip(0))
    assert not target_in_memory("layer", layer).read().requires_grad


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"it: torch.float32 of shape \(3,\)"),
        (torch.zeros(2, 2, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, 2, device="meta"), "on the meta device"),
        (torch.eye(2).to_sparse(), "stored as torch.sparse"),
        (np.zeros((2, 2), np.int64), "an array of int64"),
        (nn.Conv2d(1, 1, 1), "of type Conv2d"),
    ],
)
def test_what_is_no_dense_float_matrix_is_refused_by_its_name(matrix: object, message: str) -> None:
    with pytest.raises(WeightError, match=message) as refused:
        target_in_memory("it", matrix)  # type: ignore[arg-type]
    assert str(refused.value).startswith("it")
