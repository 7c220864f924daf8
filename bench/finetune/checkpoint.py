"""What a run has trained, kept on disk until its benchmarks are done."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from inilora_kernels.storage.atomic import write_whole

from .rows import Row
from .run import Run


def checkpoint(run: Run, folder: Path) -> Path:
    """The file of this run."""
    return folder / f"{hashlib.sha256(run.key.encode()).hexdigest()[:16]}.safetensors"


def save_checkpoint(file: Path, network: nn.Module, outcome: Row) -> None:
    """The trained parameters, and next to them what was measured during training."""
    trained = {name: value.detach().cpu() for name, value in network.named_parameters() if value.requires_grad}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, safetensors.torch.save(trained, {"outcome": json.dumps(outcome)}))


def load_checkpoint(file: Path, network: nn.Module) -> Row:
    """Put the trained parameters into a network prepared alike; return what was measured during training."""
    parameters = dict(network.named_parameters())
    with safe_open(file, "pt") as opened, torch.no_grad():
        for name in list(opened.keys()):
            parameters[name].copy_(opened.get_tensor(name))
        outcome: Row = json.loads(opened.metadata()["outcome"])
    return outcome
