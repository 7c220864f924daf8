"""Elements as compiled code gets them; tests/kernels/cpu/test_dequantize.py has every rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inilora_kernels.kernels.cpu.elements import from_bits, from_half, get, put, rounded
from inilora_kernels.kernels.cpu.jit import njit


@njit()
def stored(value: Any, bits: Any, half: Any, out: Any) -> None:
    put(out, 0, value)
    put(out, 1, rounded(out, value))
    put(out, 2, from_bits(bits))
    put(out, 3, from_half(get(half, 0), get(half, 1)))


def test_elements() -> None:
    half = np.array([-1.5], np.float16).view(np.uint8)
    for dtype, kind in ((torch.float32, torch.float32), (torch.bfloat16, torch.uint16), (torch.float16, torch.int16)):
        out = torch.zeros(4, dtype=dtype)
        stored(np.float32(0.1), np.int32(0x3F800000), half, out.view(kind).numpy())
        tenth = torch.tensor(0.1).to(dtype)
        assert torch.equal(out, torch.stack([tenth, tenth, torch.tensor(1.0).to(dtype), torch.tensor(-1.5).to(dtype)]))
