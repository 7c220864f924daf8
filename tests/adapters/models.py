"""Small models, their outputs and a few steps of training, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from inilora_kernels.factor_set import FactorSet
from inilora_kernels.factors import Certificate, Factors

from ..factorized import truncated_svd

NONE = Certificate(0.0, 0.0, 1.0, 0)


def small(bias: bool = True) -> tuple[nn.Sequential, FactorSet]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=bias), nn.ReLU(), nn.Linear(24, 8, bias=bias))
    modules = {name: Factors(*truncated_svd(model[int(name)].weight.detach(), 3), NONE, "") for name in ("0", "2")}
    return model, FactorSet(modules, {})


QUERY = "encoder.layer.0.attention.self.query"


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(1000, 30_000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids)[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


IDS = torch.arange(1, 11)[None]


def save(name: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**options)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, inputs: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(inputs)[0]  # type: ignore[no-any-return]


def train(model: Any, inputs: torch.Tensor = IDS) -> torch.Tensor:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(inputs)[0] - 1).square().mean().backward()
        optimizer.step()
    return logits(model, inputs)
