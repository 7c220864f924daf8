"""Problems for the tests of the CPU kernels."""

from __future__ import annotations

import torch

from inilora_kernels.kernels.backend import Problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def problem(d: int, k: int, rank: int, dtype: torch.dtype = torch.float32, scale: float = 0.05) -> Problem:
    generator = torch.Generator().manual_seed(d * 1000 + k + rank)
    W = (torch.randn(d, k, generator=generator) * scale).to(dtype)
    A = torch.randn(rank, k, generator=generator) * scale
    B = torch.randn(d, rank, generator=generator) * scale
    return Problem(lambda: W, (d, k), dtype, A, B)
