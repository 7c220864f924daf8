"""bitsandbytes' checkpoints as its own layers save them, against its own dequantization."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from .stored import assert_reads, read_one, write

CONFIG: dict[str, Any] = {"dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes"}}


def saved(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {f"q_proj.{name}": tensor for name, tensor in layer.state_dict().items()}


def four_bits(kind: str, nested: bool, dtype: torch.dtype, k: int = 64) -> Any:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        k, 48, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=dtype
    )
    layer.weight.data = torch.randn(48, k, dtype=dtype)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype) -> None:
    layer = four_bits(kind, nested, dtype)
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = read_one(write(tmp_path, saved(layer), CONFIG))
    assert_reads(weight, expected)
    assert kind in weight.dequantization
    assert ("double" in weight.dequantization) == nested


def test_blocks_that_cross_rows(tmp_path: Path) -> None:
    layer = four_bits("nf4", True, torch.bfloat16, k=40)
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_reads(read_one(write(tmp_path, saved(layer), CONFIG)), expected)


def test_packed_into_bfloat16(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, which FSDP wants."""
    torch.manual_seed(0)
    layer: Any = bitsandbytes.nn.Linear4bit(
        64, 48, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16
    )
    layer.weight.data = torch.randn(48, 64, dtype=torch.bfloat16)
    layer = layer.to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_reads(read_one(write(tmp_path, saved(layer), CONFIG)), expected)


def test_eight_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer: Any = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    layer.weight.data = torch.randn(48, 64, dtype=torch.float16)
    layer = layer.to("cpu")
    layer(torch.randn(2, 64, dtype=torch.float16))
    tensors = saved(layer)
    assert "q_proj.SCB" in tensors
    expected = bitsandbytes.functional.int8_vectorwise_dequant(tensors["q_proj.weight"], tensors["q_proj.SCB"])
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected.bfloat16())


@pytest.mark.parametrize("nested", [True, False])
def test_sha256_covers_every_part(tmp_path: Path, nested: bool) -> None:
    tensors = saved(four_bits("nf4", nested, torch.bfloat16))
    state = next(name for name in tensors if "quant_state" in name)
    original = read_one(write(tmp_path, tensors, CONFIG)).sha256()
    for name, tensor in tensors.items():
        if name != state:
            changed = tensor.clone()
            changed.reshape(-1).view(torch.uint8)[0] ^= 1
            assert read_one(write(tmp_path, {**tensors, name: changed}, CONFIG)).sha256() != original, name


def test_state_is_missing(tmp_path: Path) -> None:
    tensors = saved(four_bits("nf4", False, torch.bfloat16))
    del tensors["q_proj.weight.quant_state.bitsandbytes__nf4"]
    assert "quant_state is missing" in read_one(write(tmp_path, tensors, CONFIG)).refusal
