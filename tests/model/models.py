"""Small random models of transformers' classes, and their targets compared with the live model's matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from inilora_kernels.model.architecture import loaded_names
from inilora_kernels.model.checkpoint import open_checkpoint
from inilora_kernels.model.fused import row_index
from inilora_kernels.model.targets import Target, find_targets

ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
}


DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}


VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "image_size": 8,
    "patch_size": 4,
}


GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 20}


T5: dict[str, Any] = {"vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 3}


CLIP: dict[str, Any] = {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 12}


LLAVA: dict[str, Any] = {
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
}


def build(name: str, **options: Any) -> transformers.PreTrainedModel:
    """A small random model of a transformers class, such as "BertModel"."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero
            parameter.normal_()
    return model  # type: ignore[no-any-return]


def found(model: transformers.PreTrainedModel, folder: Path, target_modules: Any = None) -> list[Target]:
    """The targets in the checkpoint that the model writes; each matrix is compared with the live model's."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    targets = find_targets(checkpoint, target_modules)
    names = [target.module.partition(":")[0] for target in targets]
    live = loaded_names(model, names)
    assert live.keys() == set(names)
    for target, name in zip(targets, names, strict=True):
        module = model.get_submodule(live[name])
        weight = module.weight.detach()
        assert target.transposed == isinstance(module, Conv1D)
        expected = weight.T if target.transposed else weight
        W = target.read()
        assert torch.equal(W, expected[row_index(target.rows, len(expected))])
        assert W.shape == target.shape
        assert W.is_contiguous()
        assert W.dtype == target.dtype
        assert W.untyped_storage().nbytes() == W.nbytes
    return targets


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
