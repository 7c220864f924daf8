"""A small LLaMA and the GGUF file that llama.cpp's converter would write of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

TYPES = gguf.GGMLQuantizationType


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )


def write(path: Path, live: LlamaForCausalLM, kind: Any) -> Path:
    """As llama.cpp's converter does, which moves the rows of q_proj and k_proj."""
    config = live.config
    writer = _begun(path, "llama", config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    generator = np.random.default_rng(0)
    for name, parameter in live.state_dict().items():
        values = parameter.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        module, _, part = name.rpartition(".")
        stored = f"{names.get_name(module)}.{part}"
        if values.ndim == 1 or "embed" in name or "lm_head" in name:
            writer.add_tensor(stored, values.astype(np.float32))
        elif kind in (TYPES.Q4_K, TYPES.Q6_K):
            # gguf has no encoder for these: any bytes are a matrix, but the float16 scales must be ordinary ones.
            block, size = gguf.GGML_QUANT_SIZES[kind]
            raw = generator.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
            places = (0, 2) if kind == TYPES.Q4_K else (size - 2,)
            for place in places:
                raw[..., place : place + 2] = np.float16(0.01).reshape(1).view(np.uint8)
            writer.add_tensor(stored, raw.reshape(values.shape[0], -1), raw_dtype=kind)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    return _written(path, writer)


def mixture() -> Qwen3MoeForCausalLM:
    """transformers reads no size of the experts from a GGUF file and takes 768, which Qwen3-30B-A3B has."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 32, "moe_intermediate_size": 768}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))


def write_mixture(path: Path, live: Qwen3MoeForCausalLM, kind: Any) -> Path:
    """As llama.cpp's converter does: a stack of all experts for each of gate, up and down."""
    config = live.config
    writer = _begun(path, "qwen3moe", config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, parameter in live.state_dict().items():
        module, _, part = name.rpartition(".")
        if module.endswith("experts"):
            layer, stacks = name.split(".")[2], {"down": parameter}
            if part == "gate_up_proj":
                stacks = dict(zip(("gate", "up"), parameter.chunk(2, dim=1), strict=True))
            for stack, values in stacks.items():
                packed = gguf.quants.quantize(values.contiguous().numpy(), kind)
                writer.add_tensor(f"blk.{layer}.ffn_{stack}_exps.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(module)}.{part}", parameter.numpy())
    return _written(path, writer)


def _begun(path: Path, architecture: str, config: Any) -> gguf.GGUFWriter:
    """With what every model's header has."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * config.vocab_size)
    return writer


def _written(path: Path, writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
