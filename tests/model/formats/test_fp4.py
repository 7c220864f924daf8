"""NVFP4 and MXFP4 against compressed-tensors' and transformers' own dequantization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from inilora_kernels.model.checkpoint import open_checkpoint

from .stored import assert_hashes_every_part, assert_reads, read_one, write

CONFIG: dict[str, Any] = {"dtype": "bfloat16"}


def nvfp4() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q_proj.weight": torch.randint(0, 256, (48, 32), dtype=torch.uint8),
        "q_proj.weight_scale": (torch.rand(48, 4) * 400).to(torch.float8_e4m3fn),
        "q_proj.weight_scale_2": torch.tensor(3e-4),
    }


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ModelOpt's tensors under compressed-tensors' names, by its own converter; its own scale has one dimension."""
    converter = ModelOptNvfp4Converter(targets=["re:.*q_proj"])
    converted: dict[str, Tensor] = converter.process(dict(tensors))
    converted["q_proj.weight_global_scale"] = converted["q_proj.weight_global_scale"].reshape(1)
    return converted


def decompressed(tensors: dict[str, Tensor]) -> Tensor:
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = QuantizationScheme(**NVFP4, targets=["Linear"])
    state = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    return compressor.decompress(state, scheme)["weight"]  # type: ignore[no-any-return]


def test_compressed_tensors_reads_the_same(tmp_path: Path) -> None:
    tensors = packed(nvfp4())
    assert_reads(read_one(write(tmp_path, tensors, CONFIG)), decompressed(tensors))


def test_modelopt(tmp_path: Path) -> None:
    """Multiplied with, not divided by: equal but for the last place of the scale's reciprocal."""
    weight = read_one(write(tmp_path, nvfp4(), CONFIG))
    torch.testing.assert_close(weight.read(), decompressed(packed(nvfp4())), rtol=2**-8, atol=0)
    assert_reads(weight, weight.read())


def test_nvfp4_hashes_every_part(tmp_path: Path) -> None:
    assert_hashes_every_part(tmp_path, nvfp4(), CONFIG, "q_proj")


def experts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "mlp.experts.gate_up_proj_blocks": torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8),
        "mlp.experts.gate_up_proj_scales": torch.randint(115, 130, (3, 10, 4), dtype=torch.uint8),
    }


def test_transformers_reads_the_same_experts(tmp_path: Path) -> None:
    """It turns each expert's matrix to (in_features, out_features), as gpt-oss multiplies."""
    tensors = experts()
    expected = convert_moe_packed_tensors(*tensors.values()).transpose(1, 2)
    weight = open_checkpoint(write(tmp_path, tensors, CONFIG)).weights["mlp.experts.gate_up_proj"]
    assert weight.shape == (3, 10, 128)
    assert torch.equal(weight.read(), expected)
    assert torch.equal(weight.read(slice(1, 2)), expected[1:2])


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp4_of_a_linear_layer(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    blocks, scales = experts().values()
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)[0]
    tensors = {"q_proj.weight_packed": blocks[0].flatten(1), "q_proj.weight_scale": scales[0].view(scale_dtype)}
    weight = read_one(write(tmp_path, tensors, CONFIG))
    assert_reads(weight, expected)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    tensors = nvfp4()
    tensors["q_proj.weight_scale"] = tensors["q_proj.weight_scale"][:, :3]
    assert "do not fit nvfp4" in read_one(write(tmp_path, tensors, CONFIG)).refusal
