"""Quantized weights that no format here reads are refused with what they are stored as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inilora_kernels.errors import WeightError

from ..models import DECODER, build, write
from ..refused import refusal


def test_integer_weight(tmp_path: Path) -> None:
    write(tmp_path, {f"0.{name}.weight": torch.zeros(4, 4, dtype=torch.uint8) for name in ("q_proj", "v_proj")})
    message = refusal(tmp_path, WeightError)
    assert "0.q_proj is quantized or not floating point" in message
    assert "stored as uint8" in message
    assert "use the original model" in message


def test_eight_bit_float_weight(tmp_path: Path) -> None:
    write(tmp_path, {"q_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)})
    assert "stored as float8_e4m3fn" in refusal(tmp_path, WeightError, ["q_proj"])


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["v_proj"], r".*v_proj"])
def test_gptq_without_its_zero_points(tmp_path: Path, target_modules: Any) -> None:
    model = build("LlamaForCausalLM", **DECODER)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "layers" in name and "proj" in name:
            tensors[name.replace(".weight", ".qweight")] = torch.zeros(3, 24, dtype=torch.int32)
            tensors[name.replace(".weight", ".scales")] = torch.zeros(1, 24).half()
        else:
            tensors[name] = tensor
    config = {**model.config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    write(tmp_path, tensors, config)
    message = refusal(tmp_path, WeightError, target_modules)
    assert "by gptq, stored as qweight int32, scales float16" in message
    assert "use the original model" in message


def test_four_bit_packed_into_floats(tmp_path: Path) -> None:
    """bitsandbytes may pack into bfloat16; the tensors next to the weight give it away."""
    tensors = {"q_proj.weight": torch.zeros(8, 1).bfloat16(), "q_proj.weight.absmax": torch.zeros(1)}
    assert "q_proj is quantized" in refusal(write(tmp_path, tensors), WeightError, ["q_proj"])


def test_unknown_quantization(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}
    write(tmp_path, {"q_proj.codes": torch.zeros(8, 1, dtype=torch.int16)}, config)
    assert "by aqlm, stored as codes int16" in refusal(tmp_path, WeightError, ["q_proj"])
