"""torchao's tensors as transformers saves them (safetensors) and as torch does (.bin), against their own dequantize."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from .stored import assert_reads, read_one


def quantized(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"q_proj": layer})
    quantize_(model, config)
    return model


CONFIGS = [
    Float8WeightOnlyConfig(),
    Int8WeightOnlyConfig(version=2),
    IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_torchao_reads_the_same(tmp_path: Path, config: Any, suffix: str) -> None:
    model = quantized(config)
    if suffix == "safetensors":
        # Parameters are saved as the tensors that they hold, as transformers does.
        state_dict = {name: parameter.data for name, parameter in model.named_parameters()}
        tensors, metadata = flatten_tensor_state_dict(state_dict)
        save_file(tensors, tmp_path / "model.safetensors", metadata)
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weight = read_one(tmp_path)
    assert_reads(weight, model["q_proj"].weight.dequantize())  # type: ignore[index, union-attr]
    assert "torchao" in weight.dequantization
    assert weight.sha256()
