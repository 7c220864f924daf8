"""Results to keep in a cache."""

from __future__ import annotations

import torch

from inilora_kernels import Certificate, Factors

FIRST, SECOND = "ab" * 32, "cd" * 32


def example(source: str = FIRST) -> Factors:
    generator = torch.Generator().manual_seed(int(source[:2], 16))
    A, B = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    return Factors(A=A, B=B, certificate=Certificate(1.5, 1.0, 3.0, 10), source_sha256=source)
