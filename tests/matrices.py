"""A matrix of 30×20, float64."""

from __future__ import annotations

import torch

W = torch.rand(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
