"""A small LLaMA's folder as each quantizer stores it, and a small gpt-oss's with experts in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model import gguf_model
from ..model.formats.test_gptq import packed
from .packed_layers import AWQ_ORDER

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
GROUP = 32


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, initializer_range=0.1)
    return transformers.LlamaForCausalLM(config).to(dtype)


def plain(folder: Path, dtype: torch.dtype) -> None:
    llama(dtype).save_pretrained(folder)


def by_transformers(folder: Path, quantization: Any) -> None:
    """Quantized by what transformers calls while it loads, then saved."""
    plain(folder / "plain", torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder)


def compressed(folder: Path, form: str, **settings: Any) -> None:
    """By compressed-tensors, with scales from the largest weights, as llm-compressor does."""
    model = llama(torch.bfloat16)
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(
        config_groups={"all": scheme},
        ignore=["lm_head"],
        format=form,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        weight = module.weight.data
        grouped = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        low, high = grouped.amin(-1), grouped.amax(-1)
        if args.strategy == "tensor":
            low, high = low.min().reshape(1), high.max().reshape(1)
        over = None
        if hasattr(module, "weight_global_scale"):  # the largest float8 scale times the largest 4-bit value
            over = module.weight_global_scale.data = (448.0 * 6.0 / weight.abs().max().float()).reshape(1)
        module.weight_scale.data, zero_point = calculate_qparams(low, high, args, global_scale=over)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero_point
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def packed_words(folder: Path, method: str) -> None:
    """GPTQ's or AWQ's 4 bits in groups, to their specifications."""

    def store(weight: Tensor) -> dict[str, Tensor]:
        W = weight.float().T
        groups = W.unflatten(0, (-1, GROUP))
        low, high = groups.amin(1), groups.amax(1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales).round().clamp(1, 15).int()
        group = torch.arange(len(W)) // GROUP
        codes = (W / scales[group] + zeros[group]).round().clamp(0, 15).int()
        if method == "gptq":
            qzeros = packed((zeros - 1).T, 4).T
            return {"qweight": packed(codes, 4), "qzeros": qzeros, "scales": scales, "g_idx": group.int()}
        return {"qweight": _awq_words(codes), "qzeros": _awq_words(zeros), "scales": scales}

    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    if method == "awq":
        settings = {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    _replaced(folder, torch.float16, store, {"quant_method": method, **settings})


def _awq_words(codes: Tensor) -> Tensor:
    shifts = 4 * torch.arange(8)
    words = (codes.long().unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)] << shifts).sum(-1)
    return words.to(torch.int32)


def block_fp8(folder: Path) -> None:
    """As DeepSeek and Qwen ship it."""

    def store(weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().max() / 448
        return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale.reshape(1, 1)}

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    _replaced(folder, torch.bfloat16, store, settings)


def _replaced(
    folder: Path, dtype: torch.dtype, store: Callable[[Tensor], dict[str, Tensor]], settings: dict[str, Any]
) -> None:
    model = llama(dtype)
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        inside = name.endswith("proj.weight")
        parts = store(weight) if inside else {"weight": weight}
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _with_quantization(folder, settings)


def _with_quantization(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def gguf_file(folder: Path) -> None:
    folder.mkdir()
    gguf_model.write(folder / "model.gguf", gguf_model.model(), gguf.GGMLQuantizationType.Q8_0)


def mxfp4_experts(folder: Path) -> None:
    """gpt-oss; random bytes are as good experts as any."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.1)
    ).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, d = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, d, k // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, (experts, d, k // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _with_quantization(folder, {"quant_method": "mxfp4"})
