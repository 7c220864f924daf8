"""The kernels for GGUF's blocks against gguf's own code, to the bit, on random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from inilora_kernels.kernels.cpu.dequantize_gguf import decoder

# Where a block's float16 numbers are: any other bytes may be anything.
SCALES = {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", list(SCALES))
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_gguf(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = generator.integers(0, 256, (9, 768 // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        # Also subnormal ones of float16.
        numbers = generator.standard_normal((*raw.shape[:2], 1)) * 10.0 ** generator.integers(
            -6, 3, (*raw.shape[:2], 1)
        )
        raw[..., place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    raw = raw.reshape(9, -1)
    pick = generator.permutation(9)[:7]
    out = np.empty((7, 768), np.float32)
    decoder(kind)(raw, pick, out)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])[pick]
    assert np.array_equal(out.view(np.int32), expected.view(np.int32))


def test_other_types_are_left_to_gguf() -> None:
    assert decoder("Q5_K") is None
