"""A tiny pipeline of diffusers, and what its models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel


def save_pipeline(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=100)
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def load_pipeline(folder: Path) -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(folder, tokenizer=None, safety_checker=None)


def unet_output(unet: Any, states: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 32, generator=generator) if states is None else states
    return unet(sample, 3, states).sample  # type: ignore[no-any-return]


def output(pipeline: Any) -> Tensor:
    """Of the denoiser, for the text encoder's states."""
    return unet_output(pipeline.unet, pipeline.text_encoder(torch.arange(10).view(2, 5)).last_hidden_state)
