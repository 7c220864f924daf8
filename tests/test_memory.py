"""Memory as torch lays it out, whoever it comes from."""

from __future__ import annotations

import math

import pytest
import torch

from inilora_kernels.memory import empty, free_memory


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3000, 1001)])
def test_tensors_small_and_large(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The last one is larger than what numpy asks for huge pages for, in any dtype but the first."""
    tensor = empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    tensor.fill_(1)
    assert int(tensor.sum(dtype=torch.int64)) == math.prod(shape)


def test_some_memory_is_free() -> None:
    assert free_memory() > 0
