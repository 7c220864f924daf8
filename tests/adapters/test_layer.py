"""The layer in its two forms, against the formula in float64."""

from __future__ import annotations

import torch
from torch import nn

from inilora_kernels.adapters.layer import LoRALinear


def test_the_delta_form_computes_what_its_formula_says() -> None:
    base = nn.Linear(16, 24).double()
    generator = torch.Generator().manual_seed(0)
    A, B, A1, B1 = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 16), (24, 3), (3, 16), (24, 3))
    )
    layer = LoRALinear(base, A, B, scaling=0.7)
    layer.lora_A.weight.data, layer.lora_B.weight.data = A1, B1
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    expected = base(x) + 0.7 * x @ (B1 @ A1 - B @ A).T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta(), 0.7 * (B1 @ A1 - B @ A).float())
