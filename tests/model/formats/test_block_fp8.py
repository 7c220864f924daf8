"""Block FP8 against transformers' own dequantization, and against DeepSeek's rule where transformers has none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from .stored import assert_hashes_every_part, assert_reads, read_one, write

CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def stored(rows: int, columns: int, scale: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q_proj.weight": torch.randn(rows, columns).to(torch.float8_e4m3fn),
        "q_proj.weight_scale_inv": torch.rand(scale) * 1e-2 + 1e-3,
    }


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_transformers_reads_the_same(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    tensors = stored(384, 256, (3, 2))
    tensors["q_proj.weight_scale_inv"] = tensors["q_proj.weight_scale_inv"].to(scale_dtype)
    expected = Fp8Dequantize(None)._dequantize_one(
        tensors["q_proj.weight"], tensors["q_proj.weight_scale_inv"], torch.bfloat16
    )
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected)


def test_last_blocks_are_cut_off(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows: four blocks and a half."""
    tensors = stored(576, 200, (5, 2))
    scale = tensors["q_proj.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:576, :200]
    expected = (tensors["q_proj.weight"].float() * scale).bfloat16()
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected)


@pytest.mark.parametrize("name", ["weight_scale_inv", "qscale_weight"])
def test_one_scale_for_all(tmp_path: Path, name: str) -> None:
    """Under transformers' name and under Mistral's."""
    tensors = stored(24, 16, ())
    tensors[f"q_proj.{name}"] = tensors.pop("q_proj.weight_scale_inv")
    expected = (tensors["q_proj.weight"].float() * tensors[f"q_proj.{name}"]).bfloat16()
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected)


def test_sha256_covers_the_scales(tmp_path: Path) -> None:
    assert_hashes_every_part(tmp_path, stored(128, 128, (1, 1)), CONFIG, "q_proj")


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    assert "does not fit blocks of" in read_one(write(tmp_path, stored(256, 256, (3, 2)), CONFIG)).refusal


def test_scale_of_one_block_is_not_that_of_the_whole_matrix_where_blocks_are_smaller(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    tensors = stored(128, 128, (2, 2))
    expected = Fp8Dequantize(None)._dequantize_one(
        tensors["q_proj.weight"], tensors["q_proj.weight_scale_inv"], torch.bfloat16
    )
    assert_reads(read_one(write(tmp_path, tensors, config)), expected)
