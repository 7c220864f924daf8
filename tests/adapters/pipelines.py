"""A tiny pipeline of diffusers, and what its models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel


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


def _clip(of: Any) -> Any:
    return of(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            vocab_size=100,
            projection_dim=32,
            num_hidden_layers=2,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def save_flux(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_t5(),
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=_vae(),
    ).save_pretrained(folder)
    return folder


def save_stable_diffusion_3(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=_t5(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        transformer=transformer,
        vae=_vae(),
    ).save_pretrained(folder)
    return folder


def save_wan(folder: Path) -> Path:
    """Wan 2.2: two denoisers, the second for the low noise."""
    import diffusers

    torch.manual_seed(0)
    first, second = (
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(2)
    )
    diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=_t5(),
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.9,
    ).save_pretrained(folder)
    return folder


def save_ltx(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=_t5(),
        tokenizer=None,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _vae() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06
    )


def flux_output(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = pipeline.text_encoder(torch.arange(10).view(2, 5)).pooler_output
    return pipeline.transformer(  # type: ignore[no-any-return]
        hidden_states=torch.randn(2, 16, 4, generator=generator),
        encoder_hidden_states=torch.randn(2, 6, 32, generator=generator),
        pooled_projections=text,
        timestep=torch.ones(2),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(6, 3),
    ).sample


def stable_diffusion_3_output(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(10).view(2, 5)
    pooled = [encoder(ids).text_embeds for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    return pipeline.transformer(  # type: ignore[no-any-return]
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 6, 32, generator=generator),
        pooled_projections=torch.cat(pooled, dim=1),
        timestep=torch.ones(2),
    ).sample


def wan_output(pipeline: Any) -> Tensor:
    """Of both denoisers, one after the other."""
    generator = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 4, 2, 4, 4, generator=generator), torch.randn(1, 6, 32, generator=generator)
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        video = transformer(hidden_states=video, timestep=torch.ones(1), encoder_hidden_states=text).sample
    return video


def ltx_output(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline.transformer(  # type: ignore[no-any-return]
        hidden_states=torch.randn(1, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(1, 6, 32, generator=generator),
        timestep=torch.ones(1),
        encoder_attention_mask=torch.ones(1, 6),
        num_frames=2,
        height=2,
        width=2,
    ).sample
