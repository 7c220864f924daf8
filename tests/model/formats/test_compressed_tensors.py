"""compressed-tensors' formats against the library's own compressors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from .stored import assert_hashes_every_part, assert_reads, read_one, write

CONFIG: dict[str, Any] = {"dtype": "bfloat16", "quantization_config": {"quant_method": "compressed-tensors"}}


def compressed(
    name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random weight as the library stores it, and as it reads it again."""
    torch.manual_seed(0)
    weight = torch.randn(48, 64, dtype=dtype)
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weight.unflatten(1, (-1, args.group_size or 64))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "tensor":
        low, high = low.min().reshape(1), high.max().reshape(1)
    scale, zero_point = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    compressor: Any = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    read = compressor.decompress(stored, scheme)["weight"]
    return {f"q_proj.{part}": tensor for part, tensor in stored.items()}, read


CASES: list[tuple[str, dict[str, Any]]] = [
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}),
    ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_library_reads_the_same(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    tensors, expected = compressed(name, **settings)
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected)


def test_float16(tmp_path: Path) -> None:
    tensors, expected = compressed(
        "pack-quantized", torch.float16, num_bits=4, type="int", strategy="group", group_size=16
    )
    assert expected.dtype == torch.float16
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), expected)


def test_columns_in_order_of_activation(tmp_path: Path) -> None:
    tensors, expected = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
    group = torch.randperm(64) // 16
    scale = tensors["q_proj.weight_scale"]
    codes = expected / scale.repeat_interleave(16, 1)
    tensors["q_proj.weight_g_idx"] = group.to(torch.int32)
    weight = read_one(write(tmp_path, tensors, CONFIG))
    torch.testing.assert_close(weight.read(), codes * scale[:, group])


def test_sha256_covers_every_part(tmp_path: Path) -> None:
    tensors, _ = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False)
    del tensors["q_proj.weight_shape"]  # the shape is not a value: it is checked against the others
    shape = {"q_proj.weight_shape": torch.tensor([48, 64])}
    original = read_one(write(tmp_path, {**tensors, **shape}, CONFIG)).sha256()
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(torch.uint8).view(-1)[0] ^= 1
        assert read_one(write(tmp_path, {**tensors, **shape, name: changed}, CONFIG)).sha256() != original, name


def test_eight_bits_hash_their_scales(tmp_path: Path) -> None:
    tensors, _ = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    assert_hashes_every_part(tmp_path, tensors, CONFIG, "q_proj")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    tensors, _ = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
    tensors["q_proj.weight_shape"] = torch.tensor([48, 100])
    assert "do not fit 48×100" in read_one(write(tmp_path, tensors, CONFIG)).refusal
