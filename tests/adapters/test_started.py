"""The difference that training made, from A, B and where they started."""

from __future__ import annotations

import torch
from torch import Tensor

from inilora_kernels.adapters.started import difference

from ..factorized import inilora_alpha


def test_taking_the_difference_first_keeps_half_precision() -> None:
    """In bfloat16 the rounding error follows what training changed, not BA: the reason for `difference`."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    A0, B0 = inilora_alpha(W, 8)
    generator = torch.Generator().manual_seed(1)
    A = A0 + 1e-3 * torch.randn(A0.shape, generator=generator)
    B = B0 + 1e-3 * torch.randn(B0.shape, generator=generator)
    exact = B.double() @ A.double() - B0.double() @ A0.double()

    def error(B: Tensor, A: Tensor) -> float:
        return float((B.bfloat16().double() @ A.bfloat16().double() - exact).norm() / exact.norm())

    stable, cancelling = difference(A, B, A0, B0), (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))
    assert error(*reversed(stable)) < 2**-7
    assert error(*reversed(cancelling)) > 0.3
