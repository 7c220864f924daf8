"""Look-ups on a machine without an instruction for them; test_dequantize.py and its neighbour have the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inilora_kernels.kernels.cpu import blocks
from inilora_kernels.kernels.cpu.jit import njit


@pytest.mark.parametrize("instruction", [blocks.BYTE_SHUFFLE, ""], ids=["by an instruction", "one by one"])
def test_sixteen_values_of_their_codes(instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BYTE_SHUFFLE", instruction)

    @njit()
    def looked_up(packed: Any, values: Any, planes: Any, out: Any, high_first: Any) -> None:
        blocks.put_planes(values, np.float32(2), out, planes)
        blocks.look_up(packed, 0, planes, 0, out, 0)
        blocks.look_up_high_first(packed, 0, planes, 0, high_first, 0)

    packed = np.arange(1, 16, 2, dtype=np.uint8) * 16 + np.arange(0, 16, 2, dtype=np.uint8)[::-1]
    values = np.arange(16, dtype=np.float32)
    out, high_first = np.empty((2, 16), np.float32)
    looked_up(packed, values, np.empty(64, np.uint8), out, high_first)
    low, high = 2.0 * (packed & 15), 2.0 * (packed >> 4)
    assert out.tolist() == np.stack([low, high], 1).ravel().tolist()
    assert high_first.tolist() == np.stack([high, low], 1).ravel().tolist()
