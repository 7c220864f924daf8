"""MLX's affine quantization: to its specification, and against MLX itself where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .stored import assert_hashes_every_part, assert_reads, read_one, write

D, K, GROUP = 16, 128, 32


def config(bits: int, **settings: Any) -> dict[str, Any]:
    return {"quantization": {"group_size": GROUP, "bits": bits, **settings}}


def stored(bits: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Codes packed as one stream of bits a row, lowest first, and the matrix that they stand for."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (D, K))
    rows = [sum(code << place * bits for place, code in enumerate(row)) for row in codes.tolist()]
    packed = torch.tensor([list(row.to_bytes(K * bits // 8, "little")) for row in rows], dtype=torch.uint8)
    scales, biases = (torch.rand(D, K // GROUP) * 0.1).to(dtype), torch.randn(D, K // GROUP).to(dtype)
    tensors = {"q_proj.weight": packed.view(torch.uint32), "q_proj.scales": scales, "q_proj.biases": biases}
    return tensors, codes.to(dtype) * scales.repeat_interleave(GROUP, 1) + biases.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_scales_and_biases(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    tensors, expected = stored(bits, dtype)
    assert_reads(read_one(write(tmp_path, tensors, config(bits))), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx_reads_the_same(tmp_path: Path, bits: int) -> None:
    mlx: Any = pytest.importorskip("mlx.core")
    tensors, _ = stored(bits, torch.float16)
    arrays = [mlx.array(tensor.numpy()) for tensor in tensors.values()]
    expected = mlx.dequantize(arrays[0], arrays[1], arrays[2], group_size=GROUP, bits=bits)
    values = torch.tensor(expected.tolist(), dtype=torch.float16)
    assert_reads(read_one(write(tmp_path, tensors, config(bits))), values)


def test_group_size_of_one_module(tmp_path: Path) -> None:
    """mlx-lm's mixed quantization states other settings under a module's name."""
    tensors, expected = stored(4, torch.float16)
    settings = config(4, group_size=64, q_proj={"group_size": GROUP, "bits": 4})
    assert_reads(read_one(write(tmp_path, tensors, settings)), expected)


def test_sha256_covers_every_part(tmp_path: Path) -> None:
    assert_hashes_every_part(tmp_path, stored(4, torch.float16)[0], config(4), "q_proj")


def test_other_modes_are_refused(tmp_path: Path) -> None:
    tensors, _ = stored(4, torch.float16)
    assert "only MLX's affine quantization" in read_one(write(tmp_path, tensors, config(4, mode="mxfp4"))).refusal
