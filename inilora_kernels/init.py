"""Where A (r×k) and B (d×r) start, one function for each initialization."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(shape: tuple[int, int], rank: int, std: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """IniLoRA's start (paper, Eq. 2): A and B ~ N(0, σ̄²), float32, A drawn first.

    shape: (d, k) of W. std: σ̄, the mean of the pretrained matrices' standard deviations.

    >>> A, B = gaussian((6, 4), rank=2, std=0.02, generator=torch.Generator().manual_seed(0))
    >>> A.shape, B.shape
    (torch.Size([2, 4]), torch.Size([6, 2]))
    """
    d, k = shape
    A = torch.randn(rank, k, generator=generator) * std
    B = torch.randn(d, rank, generator=generator) * std
    return A, B
