"""Layers of quantizers' classes whose kernels need another machine or library: their buffers, torch's arithmetic.

What PEFT and the library look at is real: the class that PEFT dispatches on, the names, shapes and dtypes of what a
layer holds. Only the kernel that multiplies is replaced.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peft.tuners.lora.awq
import peft.tuners.lora.gptq
import peft.utils.other
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedLinear(nn.Module):
    """gptqmodel's layers on a CPU hold 4-bit words like this, GPTQ's with zero points as they are, not less 1."""

    def __init__(self, buffers: dict[str, Tensor], method: str) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.SUPPORTS_METHODS = [types.SimpleNamespace(value=method)]
        self.in_features = self.qweight.shape[0] * (8 if method == "gptq" else 1)
        self.out_features = self.scales.shape[1]

    def matrix(self) -> Tensor:
        """W (out_features, in_features)."""
        gptq = self.SUPPORTS_METHODS[0].value == "gptq"
        shifts = torch.arange(0, 32, 4) if gptq else 4 * torch.tensor(AWQ_ORDER).argsort()
        if gptq:
            codes = (self.qweight[:, None] >> shifts[:, None] & 15).flatten(0, 1)
        else:
            codes = (self.qweight[..., None] >> shifts & 15).flatten(1)
        zeros = (self.qzeros[..., None] >> shifts & 15).flatten(1)
        group = torch.arange(self.in_features) * len(zeros) // self.in_features
        return ((codes - zeros[group]) * self.scales[group].float()).half().T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype))


PackedLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"


@contextmanager
def gptqmodel() -> Iterator[None]:
    """PEFT finds a gptqmodel whose layers are these."""
    names = ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].BaseQuantLinear = PackedLinear  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(peft.utils.other, "is_gptqmodel_available", _yes),
        mock.patch.object(peft.tuners.lora.gptq, "is_gptqmodel_available", _yes),
        mock.patch.object(peft.tuners.lora.awq, "is_gptqmodel_available", _yes),
    ):
        yield


def _yes() -> bool:
    return True


def load_packed(folder: Path) -> nn.Module:
    """The folder's model as transformers and gptqmodel load it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    method = config.quantization_config["quant_method"]
    model, tensors = _empty(config), load_file(folder / "model.safetensors")
    for name in [name for name, _ in model.named_modules()]:
        buffers = {
            part: tensors.pop(f"{name}.{part}")
            for part in ("qweight", "qzeros", "scales")
            if f"{name}.{part}" in tensors
        }
        tensors.pop(f"{name}.g_idx", None)
        if not buffers:
            continue
        if method == "gptq":  # in memory the zero points are not less 1
            buffers["qzeros"] = buffers["qzeros"] + 0x11111111
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(buffers, method))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all("proj" in name for name in missing)
    return model


def load_fp8(folder: Path) -> nn.Module:
    """The folder's model with transformers' FP8Linear, as on a GPU; on a CPU from_pretrained dequantizes."""
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = transformers.FineGrainedFP8Config(weight_block_size=config.quantization_config["weight_block_size"])
    model = finegrained_fp8.replace_with_fp8_linear(
        _empty(config), modules_to_not_convert=["lm_head"], quantization_config=settings, pre_quantized=True
    )
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


@contextmanager
def fp8_kernel() -> Iterator[None]:
    """FP8Linear's product, which needs a GPU, by its own dequantization."""

    def product(input: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Tensor | None, *_: Any) -> Tensor:
        return F.linear(input, finegrained_fp8._dequantize_fp8_weight(weight, scale, block, input.dtype), bias)

    with mock.patch.object(finegrained_fp8, "fp8_linear", product):
        yield


def _empty(config: Any) -> Any:
    plain = transformers.LlamaConfig.from_dict({**config.to_dict(), "quantization_config": None})
    return transformers.LlamaForCausalLM(plain).to(config.dtype).eval()
