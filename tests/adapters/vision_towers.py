"""Small models whose layers are named and called as timm's VisionTransformer and open_clip's CLIP name and call theirs.

Both libraries need torchvision, whose wheels bring CUDA's torch; names and shapes are those that timm 1.0.31's and
open_clip 3.3.0's state dicts have, and a test compares them where the libraries are installed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, IMAGE, PATCH = 32, 4, 2, 16, 8
IMAGES = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """timm's: one layer for query, key and value, in thirds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """timm's, with a class token and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        patches = (IMAGE // PATCH) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, WIDTH))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class ResidualAttentionBlock(nn.Module):
    """open_clip's: torch's MultiheadAttention, and an MLP by names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        layers = [("c_fc", nn.Linear(WIDTH, 2 * WIDTH)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * WIDTH, WIDTH))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        patches = (IMAGE // PATCH) ** 2
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), Transformer(), nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj  # type: ignore[no-any-return]


class CLIP(nn.Module):
    """open_clip's image tower alone; its text tower has the same blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)  # type: ignore[no-any-return]


def save_timm(folder: Path) -> None:
    """As timm pushes a model to the hub."""
    _save(VisionTransformer(), folder / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 16, 16]}}
    (folder / "config.json").write_text(json.dumps(about))


def save_open_clip(folder: Path) -> None:
    """As open_clip pushes a model to the hub."""
    _save(CLIP(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": WIDTH}}))


def load_timm(folder: Path) -> nn.Module:
    return _load(VisionTransformer(), folder)


def load_open_clip(folder: Path) -> nn.Module:
    return _load(CLIP(), folder)


def _save(model: nn.Module, file: Path) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    file.parent.mkdir(parents=True)
    save_file(model.state_dict(), file)


def _load(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
    return model.eval()
